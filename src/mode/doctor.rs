//! `wrun doctor`: what stands between a guest and this system, and proof of it.
//!
//! Native code is put in a worker's place, with one wall left standing at a time, and tries what no guest should be able
//! to do. Where a wall may have help from elsewhere, it tries the same with no wall at all first: what does not work even
//! then proves nothing.

use std::{
    fs,
    io::{self, Write as _},
    net::TcpListener,
    os::{
        linux::net::SocketAddrExt,
        unix::{
            fs::{DirBuilderExt, symlink},
            net::{SocketAddr as UnixAddr, UnixListener},
        },
    },
    path::{Path, PathBuf},
    time::Duration,
};

use serde::Serialize;

use crate::{
    Error,
    child::{Scene, Trial, Tried, attempt_aside, live_on},
    grant::DirGrant,
    limits::Bytes,
    outcome::End,
    process::{Bounds, Jail, Program, Purpose, Wall, runtime},
};

/// What holds a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Guard {
    /// Rules for files, ports and signals.
    Landlock,
    /// The list of system calls.
    Seccomp,
    /// That root is a name only.
    Privileges,
    /// What a process may spend.
    Limits,
    /// How it was started.
    Start,
    /// Users, network and IPC of its own, where the system allows that; no other wall needs it.
    Namespaces,
}

/// What was tried or looked at, and how it went.
#[derive(Debug, Clone, Serialize)]
pub struct Check {
    /// What.
    pub what: &'static str,
    /// Which wall stood alone.
    pub guard: Guard,
    /// How it went.
    pub verdict: Verdict,
    /// What the system said.
    pub found: String,
}

/// How a check went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// The wall held.
    Held,
    /// It did not.
    Failed,
    /// This system does not allow it to anybody, so that nothing was seen of the wall.
    Unproven,
}

/// What `wrun doctor` found. As JSON: `{"kernel":…,"jail":true,"missing":null,"checks":[…]}`.
#[derive(Debug, Clone, Serialize)]
pub struct Checkup {
    /// The kernel's release.
    pub kernel: String,
    /// Whether guests get every wall: [`Isolation::Jail`](crate::Isolation::Jail) would run them.
    pub jail: bool,
    /// The walls that this system has not, in words.
    pub missing: Option<String>,
    /// All that was tried.
    pub checks: Vec<Check>,
}

use Guard::{Landlock, Limits, Namespaces, Privileges, Seccomp, Start};

/// What is tried, in words, and the walls that must each stop it alone.
const TRIALS: &[(Trial, &str, &[Guard])] = &[
    (Trial::ReadOutside, "read /etc/passwd", &[Landlock, Seccomp]),
    (Trial::ListRoot, "list the root folder", &[Landlock, Seccomp]),
    (Trial::WriteOutside, "write beside a granted folder", &[Landlock, Seccomp]),
    (Trial::FollowLink, "follow a symbolic link out of it", &[Landlock, Seccomp]),
    (Trial::RenameOut, "move a file out of it", &[Landlock, Seccomp]),
    (Trial::LinkIn, "hard-link a file into it", &[Landlock, Seccomp]),
    (Trial::Exec, "run a program", &[Landlock, Seccomp]),
    (Trial::Connect, "connect to a port", &[Landlock, Seccomp]),
    (Trial::Bind, "listen on a port", &[Landlock, Seccomp]),
    (Trial::ConnectElsewhere, "connect to a port that is not granted", &[Landlock]),
    (Trial::BindBeside, "listen when a port is granted", &[Landlock, Seccomp]),
    (Trial::UdpBeside, "open a UDP socket when a port is granted", &[Seccomp]),
    (Trial::FastOpen, "connect to another port by sending to it", &[Seccomp]),
    (Trial::OtherStream, "open a stream by a protocol beside TCP", &[Seccomp]),
    (Trial::ConnectAsRouter, "connect to a port, as a router", &[Landlock, Seccomp]),
    (Trial::NamedAsRouter, "connect to a named socket, as a router", &[Seccomp]),
    (Trial::Abstract, "connect to an abstract socket", &[Landlock, Seccomp]),
    (Trial::Udp, "open a UDP socket", &[Seccomp]),
    (Trial::SignalParent, "send its parent a signal", &[Landlock, Seccomp]),
    (Trial::Ptrace, "trace its parent", &[Landlock, Seccomp]),
    (Trial::ReadParent, "read its parent's memory", &[Landlock, Seccomp]),
    (Trial::Fork, "start a process", &[Seccomp]),
    (Trial::Mount, "mount something", &[Landlock, Seccomp, Privileges]),
    (Trial::Unshare, "enter a namespace", &[Seccomp]),
    (Trial::IoUring, "set up an io_uring", &[Seccomp]),
    (Trial::Userfaultfd, "handle page faults", &[Seccomp]),
    (Trial::Bpf, "load a BPF program", &[Seccomp]),
    (Trial::Perf, "count performance events", &[Seccomp]),
    (Trial::Keyctl, "open a keyring", &[Seccomp]),
    (Trial::LoadModule, "load a kernel module", &[Seccomp, Privileges]),
    (Trial::MakeCode, "map memory that can be executed", &[Seccomp]),
    (Trial::TakeSignal, "handle a signal", &[Seccomp]),
    (Trial::Memory, "take more memory than allowed", &[Limits]),
    (Trial::Descriptors, "open more descriptors than allowed", &[Limits]),
    (Trial::FileSize, "write a larger file than allowed", &[Limits]),
    (Trial::Threads, "start more threads than allowed", &[Namespaces]),
    (Trial::Cpu, "compute for longer than allowed", &[Limits]),
];

/// What Landlock came to know later than the rest (with its sixth interface, in Linux 6.12): a jail does without it, since
/// the list of system calls alone keeps a process from these.
const OF_LATER_LANDLOCK: [Trial; 2] = [Trial::Abstract, Trial::SignalParent];

/// What a process in the jail may spend while it tries.
const BOUNDS: Bounds =
    Bounds { cpu: Some(Duration::from_secs(1)), files: 64, file_size: Bytes::mib(1), data: Bytes::mib(64) };

/// How long a child may take to follow its parent.
const FOLLOWS_WITHIN: Duration = Duration::from_secs(5);

impl Checkup {
    /// Looks at this system, with children made of this program: [`init`](crate::init) comes first.
    ///
    /// # Errors
    /// When there is no room for the children or their files.
    ///
    /// # Panics
    /// Inside of a tokio runtime: it blocks.
    pub fn run() -> Result<Self, Error> {
        let program = Program::Own;
        if !program.is_prepared() {
            return Err(Error::Usage("call `wrun::init()` first thing in `main`".into()));
        }
        let stage = Stage::set().map_err(Error::io("make what children try to reach"))?;
        let mut checks = vec![];
        let runtime = runtime()?;
        let missing = runtime.block_on(async {
            let (_, missing) = attempt_aside(&program, Trial::ReadOutside, &stage.scene, stage.jail(&[])).await?;
            for (trial, what, guards) in TRIALS {
                for guard in *guards {
                    checks.push(check(&program, &stage, (*trial, what), *guard).await?);
                }
            }
            Ok::<_, Error>(missing)
        })?;
        checks.push(runtime.block_on(connects(&program, &stage))?);
        checks.extend(runtime.block_on(look_at_one(&program, &stage))?);
        checks.push(outlived(&program, &stage)?);
        let held = checks.iter().all(|check| check.verdict != Verdict::Failed);
        let kernel = rustix::system::uname().release().to_string_lossy().into_owned();
        Ok(Self { kernel, jail: missing.is_none() && held, missing, checks })
    }
}

/// Has one thing tried with one wall alone.
async fn check(
    program: &Program,
    stage: &Stage,
    (trial, what): (Trial, &'static str),
    guard: Guard,
) -> Result<Check, Error> {
    const ALL: [Wall; 3] = [Wall::Landlock, Wall::Seccomp, Wall::Privileges];
    let walls = |keep: Option<Wall>| ALL.into_iter().filter(|wall| Some(*wall) != keep).collect::<Vec<_>>();
    let wall = match guard {
        Landlock => Some(Wall::Landlock),
        Seccomp => Some(Wall::Seccomp),
        Privileges => Some(Wall::Privileges),
        Limits | Start | Namespaces => None,
    };
    let of = |verdict, found| Ok(Check { what, guard, verdict, found });
    if wall.is_some() {
        stage.tidy();
        match attempt_aside(program, trial, &stage.scene, stage.jail(&walls(None))).await?.0 {
            Tried::Done => {}
            // running a program is not told of: its process is another one then
            Tried::NotEntered(_) if trial == Trial::Exec => {}
            Tried::Refused(error) | Tried::Killed(error) | Tried::NotEntered(error) => {
                return of(Verdict::Unproven, format!("nobody may: {error}"));
            }
        }
    }
    stage.tidy();
    let mut jail = stage.jail(&walls(wall));
    if trial.has_port() {
        jail.ports = vec![stage.scene.port.port()];
    }
    if trial.is_of_router() {
        jail.purpose = Purpose::Router;
    }
    if guard == Seccomp {
        // without a folder nothing is opened at all
        jail.dirs.clear();
    }
    if guard == Namespaces {
        jail.namespaces = true;
        jail.dirs.clear();
    }
    match attempt_aside(program, trial, &stage.scene, jail).await? {
        (Tried::Done, _) if guard == Namespaces => {
            of(Verdict::Unproven, "root is not held to it, or this system has none".into())
        }
        (_, Some(missing)) => of(Verdict::Failed, missing),
        (Tried::Done, _) if guard == Landlock && OF_LATER_LANDLOCK.contains(&trial) => {
            of(Verdict::Unproven, "this kernel's Landlock does not know it (Linux 6.12 and later do)".into())
        }
        (Tried::Done, _) => of(Verdict::Failed, "it worked".into()),
        (Tried::NotEntered(reason), _) => of(Verdict::Failed, reason),
        (Tried::Refused(error) | Tried::Killed(error), _) => of(Verdict::Held, error),
    }
}

/// Sees that with all walls up a port can be connected to that is granted.
async fn connects(program: &Program, stage: &Stage) -> Result<Check, Error> {
    let mut jail = stage.jail(&[]);
    jail.ports = vec![stage.scene.port.port()];
    let (verdict, found) = match attempt_aside(program, Trial::ConnectGranted, &stage.scene, jail).await?.0 {
        Tried::Done => (Verdict::Held, "it worked".to_owned()),
        Tried::Refused(error) | Tried::Killed(error) | Tried::NotEntered(error) => (Verdict::Failed, error),
    };
    Ok(Check { what: "lets through to a port that is granted", guard: Landlock, verdict, found })
}

/// Looks at a process in the jail from outside.
async fn look_at_one(program: &Program, stage: &Stage) -> Result<Vec<Check>, Error> {
    let mut jail = stage.jail(&[]);
    // as most guests have none
    jail.dirs.clear();
    jail.namespaces = true;
    let child = live_on(program, &stage.scene, jail).await?;
    let proc = |file: &str| Path::new("/proc").join(child.pid().to_string()).join(file);
    let read = |file: &str| fs::read_to_string(proc(file)).unwrap_or_default();
    let (status, stat, limits) = (read("status"), read("stat"), read("limits"));
    let field = |name: &str| {
        status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).unwrap_or("none").trim().to_owned()
    };
    // after the name, which may hold anything: state, parent, group, session, terminal
    let after: Vec<_> = stat.rsplit(") ").next().unwrap_or_default().split(' ').collect();
    let session = after.get(3).copied().unwrap_or_default();
    let terminal = after.get(4).copied().unwrap_or_default();
    let core = limits.lines().find_map(|line| line.strip_prefix("Max core file size")).unwrap_or_default().trim();
    let open = fs::read_dir(proc("fd")).map_or(0, Iterator::count);
    let variables = read("environ").split('\0').filter(|variable| !variable.is_empty()).count();
    let namespace = |of: &Path| fs::read_link(of.join("ns/net")).ok();
    let own_network = namespace(&proc("")) != namespace(Path::new("/proc/self"));
    let held = |what, guard, holds, found| {
        let verdict = if holds { Verdict::Held } else { Verdict::Failed };
        Check { what, guard, verdict, found }
    };
    Ok(vec![
        held(
            "has a filter of system calls",
            Seccomp,
            field("Seccomp") == "2",
            format!("Seccomp: {}", field("Seccomp")),
        ),
        held(
            "gains no rights from a program",
            Privileges,
            field("NoNewPrivs") == "1",
            format!("NoNewPrivs: {}", field("NoNewPrivs")),
        ),
        held(
            "has no rights of root",
            Privileges,
            u64::from_str_radix(&field("CapEff"), 16) == Ok(0),
            format!("CapEff: {}", field("CapEff")),
        ),
        held(
            "leaves no core",
            Limits,
            core.starts_with("0 "),
            format!("at most {} bytes", core.split(' ').next().unwrap_or_default()),
        ),
        held(
            "has a session of its own and no terminal",
            Start,
            session == child.pid().to_string() && terminal == "0",
            format!("session {session}, terminal {terminal}"),
        ),
        Check {
            what: "has a network of its own, with nobody in it",
            guard: Namespaces,
            verdict: if own_network { Verdict::Held } else { Verdict::Unproven },
            found: if own_network { "another ns/net".into() } else { "this system does not let it".into() },
        },
        held("inherits no variable", Start, variables == 0, format!("{variables} variables")),
        held(
            "inherits no descriptor",
            Start,
            (1..=DESCRIPTORS).contains(&open),
            format!("{open} descriptors: its socket, its counters, and two that lead nowhere"),
        ),
    ])
}

/// Descriptors that a child in the jail has at most.
const DESCRIPTORS: usize = 4;

/// Ends the parent of a process in the jail, which for the kernel is the thread that made it, and sees whether it lives
/// on.
fn outlived(program: &Program, stage: &Stage) -> Result<Check, Error> {
    let cannot = Error::io("start a thread");
    let (program, scene, jail) = (program.clone(), stage.scene.clone(), stage.jail(&[]));
    let parent = std::thread::Builder::new()
        .spawn(move || runtime()?.block_on(live_on(&program, &scene, jail)))
        .map_err(cannot)?;
    let mut orphan = parent.join().map_err(|_| Error::Stopped)??;
    let ended = orphan.ended_within(FOLLOWS_WITHIN).map_err(Error::io("wait for a process"))?;
    let (verdict, found) = match ended {
        Some(End::Killed { signal: 9 }) => (Verdict::Held, "SIGKILL".to_owned()),
        Some(end) => (Verdict::Failed, end.to_string()),
        None => (Verdict::Failed, "it lives on".to_owned()),
    };
    Ok(Check { what: "live on without its parent", guard: Start, verdict, found })
}

/// What children try to reach: a folder that is granted and one that is not, two ports, an abstract socket. It is gone when
/// it is dropped.
struct Stage {
    root: PathBuf,
    scene: Scene,
    _ports: [TcpListener; 2],
    sockets: Vec<UnixListener>,
}

impl Stage {
    fn set() -> io::Result<Self> {
        let mut unique = [0; 8];
        rustix::rand::getrandom(&mut unique, rustix::rand::GetRandomFlags::empty())?;
        let unique = format!("wrun-doctor-{:016x}", u64::from_ne_bytes(unique));
        let root = std::env::temp_dir().join(&unique);
        fs::DirBuilder::new().mode(0o700).create(&root)?;
        let port = TcpListener::bind(("127.0.0.1", 0))?;
        let elsewhere = TcpListener::bind(("127.0.0.1", 0))?;
        let socket = UnixListener::bind_addr(&UnixAddr::from_abstract_name(unique.as_bytes())?)?;
        let scene = Scene {
            inside: root.join("inside"),
            port: port.local_addr()?,
            elsewhere: elsewhere.local_addr()?,
            name: unique,
            parent: rustix::process::getpid().as_raw_pid(),
        };
        let mut stage = Self { root, scene, _ports: [port, elsewhere], sockets: vec![socket] };
        for folder in ["inside", "outside"] {
            fs::create_dir(stage.root.join(folder))?;
            fs::File::create(stage.root.join(folder).join("file"))?.write_all(b"file\n")?;
        }
        stage.sockets.push(UnixListener::bind(stage.root.join("outside/socket"))?);
        symlink("../outside/file", stage.scene.inside.join("link"))?;
        Ok(stage)
    }

    /// Undoes what a trial that worked has done.
    fn tidy(&self) {
        let _ = fs::rename(self.root.join("outside/moved"), self.root.join("inside/file"));
        for made in ["inside/linked", "inside/large", "outside/made"] {
            let _ = fs::remove_file(self.root.join(made));
        }
    }

    /// A jail with the folder granted, and without these walls.
    fn jail(&self, without: &[Wall]) -> Jail {
        let (host, guest) = (self.scene.inside.clone(), "/".into());
        Jail {
            required: false,
            dirs: vec![DirGrant { host, guest, read_only: false }],
            ports: vec![],
            purpose: Purpose::Guest,
            namespaces: false,
            threads: 0,
            bounds: BOUNDS,
            without: without.to_vec(),
        }
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.root);
    }
}
