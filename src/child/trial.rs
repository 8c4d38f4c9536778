//! A child that tries what no guest should be able to do, as native code in a worker's place: what stops it is the jail
//! alone, without the engine's help. Both ends are here.

use std::{
    fs::{self, File},
    io::{self, Write},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::{
        fd::OwnedFd,
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr as UnixAddr, UnixStream},
    },
    path::PathBuf,
    task::Poll,
    time::Duration,
};

use libc::c_long;
use rustix::{
    io::Errno,
    net::{AddressFamily, Protocol, SendFlags, SocketFlags, SocketType},
};
use serde::{Deserialize, Serialize};

use super::enter;
use crate::{
    Error,
    outcome::End,
    process::{
        Jail, Process, Program, Role, Seen, THREADS,
        child::{Out, Start},
        wire::Kind,
    },
    signal::Signal,
};

/// What is tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Trial {
    ReadOutside,
    ListRoot,
    WriteOutside,
    FollowLink,
    RenameOut,
    LinkIn,
    Exec,
    Connect,
    Bind,
    Abstract,
    Udp,
    /// These with a port to connect to.
    ConnectGranted,
    ConnectElsewhere,
    BindBeside,
    UdpBeside,
    FastOpen,
    OtherStream,
    /// These in a router's place.
    ConnectAsRouter,
    NamedAsRouter,
    SignalParent,
    Ptrace,
    ReadParent,
    Fork,
    Mount,
    Unshare,
    IoUring,
    Userfaultfd,
    Bpf,
    Perf,
    Keyctl,
    LoadModule,
    MakeCode,
    TakeSignal,
    Memory,
    Descriptors,
    FileSize,
    Threads,
    Cpu,
    /// Nothing: it lives on, for others to look at.
    Live,
}

/// What a trial needs to know of the world.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Scene {
    /// The folder that is granted; beside it there is one that is not, `outside`.
    pub(crate) inside: PathBuf,
    /// Somebody listens there.
    pub(crate) port: SocketAddr,
    /// And there, where nobody may connect to when the port is granted.
    pub(crate) elsewhere: SocketAddr,
    /// And at this abstract name.
    pub(crate) name: String,
    /// The process that started it.
    pub(crate) parent: i32,
}

impl Trial {
    /// Whether whoever tries it may connect to the scene's port.
    pub(crate) fn has_port(self) -> bool {
        use Trial::{BindBeside, ConnectElsewhere, ConnectGranted, FastOpen, OtherStream, UdpBeside};
        matches!(self, ConnectGranted | ConnectElsewhere | BindBeside | UdpBeside | FastOpen | OtherStream)
    }

    /// Whether it is tried in a router's place.
    pub(crate) fn is_of_router(self) -> bool {
        matches!(self, Self::ConnectAsRouter | Self::NamedAsRouter)
    }
}

/// What the child is told.
#[derive(Debug, Serialize, Deserialize)]
struct TrialConfig {
    trial: Trial,
    scene: Scene,
    jail: Jail,
}

/// How a trial went.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Tried {
    /// It worked.
    Done,
    /// It was refused, with this error.
    Refused(String),
    /// The process was ended by this signal.
    Killed(String),
    /// The jail was not entered, for this reason.
    NotEntered(String),
}

/// The child.
pub(super) fn main(start: Start) -> i32 {
    let out = Out::new(start.socket);
    let Ok(config) = serde_json::from_str::<TrialConfig>(start.hello.config.get()) else { return 125 };
    let tried = match enter(&config.jail, &out, || Ok(())) {
        Err(error) => Tried::NotEntered(error.to_string()),
        Ok(()) => match attempt(config.trial, &config.scene, &config.jail) {
            Ok(()) => Tried::Done,
            Err(error) => Tried::Refused(name_of(&error)),
        },
    };
    if config.trial == Trial::Live {
        // whoever waits for this knows that it is inside now
        out.push(Kind::Ready, 0, b"null");
        out.finish();
        loop {
            std::thread::park();
        }
    }
    out.push(Kind::Ready, 0, &serde_json::to_vec(&tried).expect("plain data has a JSON form"));
    out.finish();
    0
}

/// Has a child try something. The walls that it had to do without come with how it went.
///
/// # Errors
/// When there is no room for the child.
pub(crate) async fn attempt_aside(
    program: &Program,
    trial: Trial,
    scene: &Scene,
    jail: Jail,
) -> Result<(Tried, Option<String>), Error> {
    let config = TrialConfig { trial, scene: scene.clone(), jail };
    let child = Process::start(program, Role::Trial, &config, &[], 1 << 16).map_err(Error::io("start a process"))?;
    let (mut said, mut missing) = (None, None);
    let (end, _) = child
        .finish(Some(WITHIN), |frame| match frame.kind {
            Kind::Ready => said = serde_json::from_slice::<Tried>(frame.body).ok(),
            Kind::Walls => missing = Some(String::from_utf8_lossy(frame.body).into_owned()),
            _ => {}
        })
        .await;
    let tried = said.unwrap_or_else(|| match end {
        End::Killed { signal } => Tried::Killed(
            Signal::from_number(signal).map_or_else(|| format!("signal {signal}"), |signal| signal.to_string()),
        ),
        end => Tried::NotEntered(format!("its process {end}")),
    });
    Ok((tried, missing))
}

/// Starts a child that does nothing but live on, and waits until it is inside. The kernel ends it with the thread that
/// calls.
///
/// # Errors
/// When there is no room for it.
pub(crate) async fn live_on(program: &Program, scene: &Scene, jail: Jail) -> Result<Process, Error> {
    let config = TrialConfig { trial: Trial::Live, scene: scene.clone(), jail };
    let mut child =
        Process::start_on_this_thread(program, Role::Trial, &config).map_err(Error::io("start a process"))?;
    child.flush();
    let mut ready = false;
    let gone = std::future::poll_fn(|cx| {
        loop {
            match child.poll(cx, |frame| ready |= frame.kind == Kind::Ready) {
                _ if ready => return Poll::Ready(None),
                Poll::Ready(Seen::Gone(end)) => return Poll::Ready(Some(end)),
                Poll::Ready(_) => {}
                Poll::Pending => return Poll::Pending,
            }
        }
    });
    match gone.await {
        None => Ok(child),
        Some(end) => Err(Error::io("keep a process")(io::Error::other(format!("it {end}")))),
    }
}

/// How long a trial may take.
const WITHIN: Duration = Duration::from_secs(20);

/// The name of an error, as manuals have it.
fn name_of(error: &io::Error) -> String {
    let name = match Errno::from_io_error(error) {
        Some(Errno::PERM) => "EPERM",
        Some(Errno::ACCESS) => "EACCES",
        Some(Errno::NOSYS) => "ENOSYS",
        Some(Errno::NOMEM) => "ENOMEM",
        Some(Errno::AGAIN) => "EAGAIN",
        Some(Errno::MFILE) => "EMFILE",
        Some(Errno::FBIG) => "EFBIG",
        Some(Errno::XDEV) => "EXDEV",
        _ => return error.to_string(),
    };
    name.into()
}

fn attempt(trial: Trial, scene: &Scene, jail: &Jail) -> io::Result<()> {
    let outside = scene.inside.with_file_name("outside");
    let inside = |name: &str| scene.inside.join(name);
    match trial {
        Trial::ReadOutside => File::open("/etc/passwd").map(drop),
        Trial::ListRoot => fs::read_dir("/").map(drop),
        Trial::WriteOutside => File::create(outside.join("made")).map(drop),
        Trial::FollowLink => File::open(inside("link")).map(drop),
        Trial::RenameOut => fs::rename(inside("file"), outside.join("moved")),
        Trial::LinkIn => fs::hard_link(outside.join("file"), inside("linked")),
        Trial::Connect | Trial::ConnectGranted | Trial::ConnectAsRouter => TcpStream::connect(scene.port).map(drop),
        Trial::ConnectElsewhere => TcpStream::connect(scene.elsewhere).map(drop),
        // a connection that is made by what is sent over it
        Trial::FastOpen => {
            let socket = stream_of(None)?;
            let fast_open = SendFlags::from_bits_retain(libc::MSG_FASTOPEN.cast_unsigned());
            Ok(rustix::net::sendto(&socket, b"hello", fast_open, &scene.elsewhere).map(drop)?)
        }
        Trial::OtherStream => stream_of(Some(rustix::net::ipproto::MPTCP)).map(drop),
        Trial::Bind | Trial::BindBeside => TcpListener::bind((scene.port.ip(), 0)).map(drop),
        Trial::Abstract => UnixStream::connect_addr(&UnixAddr::from_abstract_name(scene.name.as_bytes())?).map(drop),
        Trial::NamedAsRouter => UnixStream::connect(outside.join("socket")).map(drop),
        Trial::Udp | Trial::UdpBeside => UdpSocket::bind((scene.port.ip(), 0)).map(drop),
        Trial::FileSize => {
            let mut file = File::create(inside("large"))?;
            let size = usize::try_from(jail.bounds.file_size.0).unwrap_or(usize::MAX);
            file.write_all(&vec![0; size])?;
            // one byte more than it may have
            file.write_all(&[0])
        }
        Trial::Descriptors => {
            let mut open = vec![];
            for _ in 0..=jail.bounds.files {
                open.push(rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC)?);
            }
            Ok(())
        }
        Trial::Threads => {
            let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get() as u64);
            for _ in 0..=THREADS + cores {
                std::thread::Builder::new().stack_size(16 << 10).spawn(std::thread::park)?;
            }
            Ok(())
        }
        Trial::Cpu => {
            // until the system ends it; by the clock on the wall it would have been let go on
            let begun = std::time::Instant::now();
            while begun.elapsed() < WITHIN / 2 {}
            Ok(())
        }
        Trial::Live => Ok(()),
        _ => call(trial, scene.parent, jail),
    }
}

/// A socket for a stream over IPv4, by this protocol.
fn stream_of(protocol: Option<Protocol>) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC;
    Ok(rustix::net::socket_with(AddressFamily::INET, SocketType::STREAM, flags, protocol)?)
}

/// Makes the system call that is tried. One that fails for what it was given was let through.
fn call(trial: Trial, parent: i32, jail: &Jail) -> io::Result<()> {
    const NULL: c_long = 0;
    let parent = c_long::from(parent);
    let path = c"/bin/true".as_ptr() as c_long;
    // as a range of one byte somewhere, or as a way to handle a signal: the usual one
    let range = [0x1000_u64, 1, 0, 0];
    let range = range.as_ptr() as c_long;
    let (read, write) = (libc::PROT_READ, libc::PROT_WRITE);
    let anonymous = c_long::from(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    let flags = |flags: i32| c_long::from(flags);
    let too_much = c_long::try_from(jail.bounds.data.0).unwrap_or(c_long::MAX);
    let (number, arguments): (c_long, [c_long; 6]) = match trial {
        Trial::Exec => (libc::SYS_execve, [path, NULL, NULL, 0, 0, 0]),
        Trial::SignalParent => (libc::SYS_kill, [parent, 0, 0, 0, 0, 0]),
        Trial::Ptrace => (libc::SYS_ptrace, [PTRACE_SEIZE, parent, NULL, 0, 0, 0]),
        Trial::ReadParent => (libc::SYS_process_vm_readv, [parent, range, 1, range, 1, 0]),
        Trial::Fork => (libc::SYS_clone, [flags(libc::SIGCHLD), NULL, NULL, NULL, 0, 0]),
        Trial::Mount => (libc::SYS_mount, [path, path, path, 0, NULL, 0]),
        Trial::Unshare => (libc::SYS_unshare, [flags(libc::CLONE_NEWUSER), 0, 0, 0, 0, 0]),
        Trial::IoUring => (libc::SYS_io_uring_setup, [1, NULL, 0, 0, 0, 0]),
        Trial::Userfaultfd => (libc::SYS_userfaultfd, [0; 6]),
        Trial::Bpf => (libc::SYS_bpf, [0, NULL, 0, 0, 0, 0]),
        Trial::Perf => (libc::SYS_perf_event_open, [NULL, 0, -1, -1, 0, 0]),
        Trial::Keyctl => (libc::SYS_keyctl, [0, -2, 1, 0, 0, 0]),
        Trial::LoadModule => (libc::SYS_init_module, [NULL, 0, path, 0, 0, 0]),
        Trial::MakeCode => (libc::SYS_mmap, [NULL, 4096, flags(read | write | libc::PROT_EXEC), anonymous, -1, 0]),
        Trial::TakeSignal => (libc::SYS_rt_sigaction, [flags(libc::SIGUSR1), range, NULL, 8, 0, 0]),
        Trial::Memory => (libc::SYS_mmap, [NULL, too_much, flags(read | write), anonymous, -1, 0]),
        _ => unreachable!("every other trial has its own code"),
    };
    let [first, second, third, fourth, fifth, sixth] = arguments;
    // SAFETY: pointers are null, or to what lives longer than the call and is only read. Memory that is mapped is new and
    // never used; a process that is made is this one again, on its own copy of everything, and ends at once; one that
    // becomes another program, or handles a signal at an address of nothing, gets none and has nothing left to do.
    let result = unsafe { libc::syscall(number, first, second, third, fourth, fifth, sixth) };
    let error = io::Error::last_os_error();
    if trial == Trial::Fork && result == 0 {
        #[expect(clippy::exit, reason = "this is the copy")]
        std::process::exit(0);
    }
    match Errno::from_io_error(&error) {
        _ if result >= 0 => Ok(()),
        Some(Errno::PERM | Errno::ACCESS | Errno::NOSYS | Errno::NOMEM) => Err(error),
        _ => Ok(()),
    }
}

/// `PTRACE_SEIZE`, which lets the other process run on.
const PTRACE_SEIZE: c_long = 0x4206;
