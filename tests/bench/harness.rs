//! Rounds, medians and ratios, and the peers to compare with.

use std::{
    io::{Read, Write},
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    time::{Duration, Instant},
};

use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};
use wrun::{Cache, Cluster, cluster::Builder};

pub(crate) const WRUN: &str = env!("CARGO_BIN_EXE_wrun");
const ECHO_ARG: &str = "--bench-echo";

/// One thing to measure: each call answers one figure.
pub(crate) type Probe<'a> = (&'a str, Box<dyn FnMut() -> f64 + 'a>);

/// Measures all probes in turn, round by round, and prints a line for each; the last are what the first is measured
/// against.
pub(crate) fn compare(what: &str, unit: &str, rounds: usize, mut probes: Vec<Probe<'_>>) {
    let mut figures: Vec<Vec<f64>> = vec![vec![]; probes.len()];
    for (_, probe) in &mut probes {
        probe();
    }
    for _ in 0..rounds {
        for (figures, (_, probe)) in figures.iter_mut().zip(&mut probes) {
            figures.push(probe());
        }
    }
    for (at, ((name, _), own)) in probes.iter().zip(&figures).enumerate() {
        let name =
            if at == 0 { format!("{what}: {name}") } else { format!("{:width$}  {name}", "", width = what.len()) };
        print!("  {name:<58} {:>30}", format!("{} {unit}", spread(own)));
        if at > 0 {
            let ratios: Vec<f64> = figures[0].iter().zip(own).map(|(ours, theirs)| ours / theirs).collect();
            print!("   wrun is {} x", spread(&ratios));
        }
        println!();
    }
}

/// `median [least, most]`
pub(crate) fn spread(figures: &[f64]) -> String {
    if figures.is_empty() {
        return "none".into();
    }
    let mut sorted = figures.to_vec();
    sorted.sort_by(f64::total_cmp);
    let show = |figure: f64| match figure {
        f if f >= 1000.0 => format!("{f:.0}"),
        f if f >= 10.0 => format!("{f:.1}"),
        f => format!("{f:.2}"),
    };
    format!("{} [{}, {}]", show(sorted[sorted.len() / 2]), show(sorted[0]), show(sorted[sorted.len() - 1]))
}

pub(crate) fn time(run: impl FnOnce()) -> Duration {
    let start = Instant::now();
    run();
    start.elapsed()
}

/// A folder for compiled code, warm after the first use.
pub(crate) fn cache_dir() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("bench-cache")
}

pub(crate) fn pool(guest: &str, workers: u32) -> Builder {
    Cluster::builder(guest).workers(workers).cache(Cache::at(Some(&cache_dir())))
}

/// Runs a pool and something that uses it on this thread.
pub(crate) fn with_pool<T, F: Future<Output = T>>(builder: Builder, work: impl FnOnce(Cluster) -> F) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    tokio::task::LocalSet::new().block_on(&runtime, async {
        let (cluster, run) = builder.start_here().await.unwrap();
        let mut run = std::pin::pin!(run);
        let mut work = std::pin::pin!(work(cluster));
        tokio::select! {
            // the work has dropped or shut its pool down when it ends; its workers are waited for below
            done = &mut work => {
                let _ = run.await;
                done
            }
            ended = &mut run => {
                ended.unwrap();
                work.await
            }
        }
    })
}

/// Runs something on a thread for which, and for all that it starts, the kernel has neither Landlock nor seccomp: there
/// wrun does without the walls.
pub(crate) fn without_walls<T: Send>(run: impl FnOnce() -> T + Send) -> T {
    on_a_thread(|| {
        let calls = [libc::SYS_landlock_create_ruleset, libc::SYS_seccomp];
        let unknown = SeccompAction::Errno(libc::ENOSYS.cast_unsigned());
        let rules = calls.into_iter().map(|call| (call, vec![])).collect();
        let arch = std::env::consts::ARCH.try_into().unwrap();
        let filter = SeccompFilter::new(rules, SeccompAction::Allow, unknown, arch).unwrap();
        seccompiler::apply_filter(&BpfProgram::try_from(filter).unwrap()).unwrap();
        run()
    })
}

/// Runs something on a thread of its own.
pub(crate) fn on_a_thread<T: Send>(run: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| scope.spawn(run).join().unwrap())
}

/// Whether this process is the other end of [`Echo`].
pub(crate) fn is_echo() -> bool {
    std::env::args().nth(1).is_some_and(|arg| arg == ECHO_ARG)
}

/// Gives back all bytes that come, frame by frame: a length of four bytes, then as many.
pub(crate) fn echo() {
    use std::os::fd::AsFd;
    let socket = std::io::stdin().as_fd().try_clone_to_owned().unwrap();
    let mut socket = UnixStream::from(socket);
    let mut frame = vec![];
    while read_frame(&mut socket, &mut frame) {
        socket.write_all(&frame).unwrap();
    }
}

/// Reads one frame with its length.
fn read_frame(socket: &mut impl Read, frame: &mut Vec<u8>) -> bool {
    frame.resize(4, 0);
    if socket.read_exact(frame).is_err() {
        return false;
    }
    let length = u32::from_le_bytes(frame[..4].try_into().unwrap()) as usize;
    frame.resize(4 + length, 0);
    socket.read_exact(&mut frame[4..]).is_ok()
}

/// A process at the other end of a bare socket pair: the limit of what messages between processes can do.
pub(crate) struct Echo {
    socket: UnixStream,
    child: Child,
}

impl Echo {
    pub(crate) fn start() -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        for socket in [&ours, &theirs] {
            let _ = rustix::net::sockopt::set_socket_send_buffer_size(socket, 1 << 20);
        }
        let child = Command::new(std::env::current_exe().unwrap())
            .arg(ECHO_ARG)
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .spawn()
            .unwrap();
        Self { socket: ours, child }
    }

    /// Sends so many messages of a length, so many at a time ahead of the answers.
    pub(crate) fn send(&mut self, count: usize, length: usize, window: usize) {
        let mut frame = vec![b'x'; 4 + length];
        frame[..4].copy_from_slice(&u32::try_from(length).unwrap().to_le_bytes());
        let mut answer = vec![];
        if window == 1 {
            for _ in 0..count {
                self.socket.write_all(&frame).unwrap();
                assert!(read_frame(&mut self.socket, &mut answer));
            }
            return;
        }
        // two directions at once need two hands
        let mut writing = self.socket.try_clone().unwrap();
        let (free, wait) = std::sync::mpsc::sync_channel(window);
        let writer = std::thread::spawn(move || {
            for _ in 0..count {
                free.send(()).unwrap();
                writing.write_all(&frame).unwrap();
            }
        });
        let mut reading = std::io::BufReader::with_capacity(256 << 10, &self.socket);
        for _ in 0..count {
            assert!(read_frame(&mut reading, &mut answer));
            wait.recv().unwrap();
        }
        writer.join().unwrap();
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Node, when it is installed, on one of the scripts below: a line to its input is answered by a line with a figure.
pub(crate) struct Node {
    child: Child,
    stdin: ChildStdin,
    stdout: std::io::BufReader<ChildStdout>,
}

/// `child_process.fork`: `N LENGTH WINDOW` sends so many messages, and answers the microseconds that took, or with a
/// further number those of one message, of which so many per cent take no longer; `fork` starts a child, and answers the microseconds to its first message.
const NODE: &str = r#"
const { fork } = require("child_process"), fs = require("fs"), os = require("os"), path = require("path");
const file = path.join(fs.mkdtempSync(path.join(os.tmpdir(), "wrun-bench-")), "child.js");
fs.writeFileSync(file, `process.on("message", m => process.send(m)); process.send("ready");`);
const start = () => new Promise(done => { const c = fork(file); c.once("message", () => done(c)); });
const micros = since => Number(process.hrtime.bigint() - since) / 1000;
start().then(child => {
  require("readline").createInterface({ input: process.stdin }).on("line", async line => {
    const since = process.hrtime.bigint();
    if (line === "fork") { const c = await start(); console.log(micros(since)); c.kill(); return; }
    let [count, length, window, percent] = line.split(" ").map(Number), sent = 0, got = 0, last = since;
    const text = "x".repeat(length), each = [];
    child.removeAllListeners("message");
    child.on("message", () => {
      if (percent) { const now = process.hrtime.bigint(); each.push(Number(now - last) / 1000); last = now; }
      if (++got === count) {
        each.sort((a, b) => a - b);
        console.log(percent ? each[Math.floor(count * percent / 100)] : micros(since));
      }
      else if (sent < count) { sent++; child.send(text); }
    });
    while (sent < Math.min(window, count)) { sent++; child.send(text); }
  }).on("close", () => { child.kill(); fs.rmSync(path.dirname(file), { recursive: true }); process.exit(); });
});
"#;

impl Node {
    pub(crate) fn start() -> Option<Self> {
        Self::on(NODE)
    }

    /// Node on another script of the same manners.
    pub(crate) fn on(script: &str) -> Option<Self> {
        let mut child =
            Command::new("node").args(["-e", script]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().ok()?;
        let stdin = child.stdin.take().unwrap();
        let stdout = std::io::BufReader::new(child.stdout.take().unwrap());
        Some(Self { child, stdin, stdout })
    }

    /// One command, and its figure in microseconds.
    pub(crate) fn ask(&mut self, command: &str) -> f64 {
        use std::io::BufRead;
        writeln!(self.stdin, "{command}").unwrap();
        let mut line = String::new();
        self.stdout.read_line(&mut line).unwrap();
        line.trim().parse().unwrap()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
