//! The builder that drives the real program.
//!
//! A command that ends by itself:
//!
//! ```ignore
//! wrun(["run", HELLO]).run().code(0).stdout("Hello, world!\n").stderr("");
//! ```
//!
//! One that lives on while the test talks to it:
//!
//! ```ignore
//! let mut cluster = wrun(["cluster", ECHO]).stdin_open().spawn();
//! cluster.write_line("42");
//! assert_eq!(cluster.stdout_line(), r#"{"line":1,"reply":42}"#);
//! cluster.signal(Signal::TERM);
//! cluster.wait().code(0);
//! ```
//!
//! The program starts in a folder of its own, with nothing in its environment but `XDG_CACHE_HOME`. Every wait ends at
//! one [`DEADLINE`]: then the program is killed and the test fails with all that was printed.

use std::{
    ffi::{OsStr, OsString},
    fs::{self, File},
    io::{self, Read as _, Write as _},
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, ExitStatus, Stdio},
    rc::Rc,
    sync::OnceLock,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec},
    fs::OFlags,
    process::{Pid, PidfdFlags, Signal},
};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};
use tempfile::TempDir;

pub(crate) use crate::finished::Finished;
use crate::finished::transcript;

/// How long a program may take, from its start to its end: far more than any needs, also on a busy machine.
pub(crate) const DEADLINE: Duration = Duration::from_mins(1);

/// The program under test.
pub(crate) const WRUN: &str = env!("CARGO_BIN_EXE_wrun");

/// `wrun` with these arguments, in a new folder.
pub(crate) fn wrun(args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Wrun {
    Folder::new().wrun(args)
}

/// A temporary folder, in which programs start and find their files. It goes with its last user.
#[derive(Clone)]
pub(crate) struct Folder(Rc<TempDir>);

impl Folder {
    pub(crate) fn new() -> Self {
        Self(Rc::new(TempDir::with_prefix("wrun-test-").expect("a temporary folder")))
    }

    /// `wrun` with these arguments, in this folder.
    pub(crate) fn wrun(&self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Wrun {
        Wrun {
            folder: self.clone(),
            args: args.into_iter().map(|arg| arg.as_ref().to_owned()).collect(),
            env: vec![("XDG_CACHE_HOME".into(), shared_cache().into())],
            redirections: vec![],
            open_files: None,
            unknown_calls: vec![],
            ignored: None,
            stdin: Input::Null,
            stdout: None,
        }
    }

    pub(crate) fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.0.path().join(name)
    }

    /// With a file in it, and the folders on the way there.
    pub(crate) fn file(self, name: &str, content: impl AsRef<[u8]>) -> Self {
        let path = self.path(name);
        fs::create_dir_all(path.parent().expect("a name in a folder")).expect("folders");
        fs::write(path, content).expect("a file");
        self
    }

    /// With a folder in it.
    pub(crate) fn folder(self, name: &str) -> Self {
        fs::create_dir_all(self.path(name)).expect("folders");
        self
    }

    /// With a symbolic link in it.
    pub(crate) fn link(self, name: &str, to: impl AsRef<Path>) -> Self {
        std::os::unix::fs::symlink(to, self.path(name)).expect("a link");
        self
    }

    /// A file's text.
    pub(crate) fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    /// The names of what is in a folder of this one, sorted; none when there is no such folder.
    pub(crate) fn names(&self, name: &str) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.path(name)) else { return vec![] };
        let mut names: Vec<_> =
            entries.map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }
}

/// Where all tests keep compiled code, so that each guest is compiled once. Another build of `wrun` gets another one.
fn shared_cache() -> &'static Path {
    static CACHE: OnceLock<PathBuf> = OnceLock::new();
    CACHE.get_or_init(|| {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let built = fs::metadata(WRUN).and_then(|meta| meta.modified()).expect("the program is there");
        let name = format!("cache-{}", built.duration_since(std::time::UNIX_EPOCH).expect("after 1970").as_nanos());
        for entry in fs::read_dir(folder).expect("cargo makes it").flatten() {
            let other = entry.file_name().to_string_lossy().into_owned();
            if other.starts_with("cache-") && other != name {
                // another process may be doing the same
                let _ = fs::remove_dir_all(entry.path());
            }
        }
        folder.join(name)
    })
}

enum Input {
    Null,
    Bytes(Vec<u8>),
    Open,
}

/// A command that is not started yet.
#[must_use = "nothing starts before `run` or `spawn`"]
pub(crate) struct Wrun {
    folder: Folder,
    args: Vec<OsString>,
    env: Vec<(OsString, OsString)>,
    redirections: Vec<&'static str>,
    open_files: Option<u32>,
    unknown_calls: Vec<i64>,
    ignored: Option<&'static str>,
    stdin: Input,
    stdout: Option<File>,
}

impl Wrun {
    /// More arguments.
    pub(crate) fn args(mut self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Self {
        self.args.extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    /// One more argument.
    pub(crate) fn arg(self, arg: impl AsRef<OsStr>) -> Self {
        self.args([arg])
    }

    /// A variable of the environment.
    pub(crate) fn env(mut self, name: impl Into<OsString>, value: impl Into<OsString>) -> Self {
        self.env.push((name.into(), value.into()));
        self
    }

    /// Keeps compiled code in the test's own folder, under `cache/wrun`, instead of where all tests keep theirs.
    pub(crate) fn private_cache(self) -> Self {
        let cache = self.folder.path("cache");
        self.env("XDG_CACHE_HOME", cache)
    }

    /// Standard input has these bytes, and then ends. Without this it is empty.
    pub(crate) fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdin = Input::Bytes(bytes.into());
        self
    }

    /// Standard input is a pipe that stays open, see [`Running::write_line`] and [`Running::close_stdin`].
    pub(crate) fn stdin_open(mut self) -> Self {
        self.stdin = Input::Open;
        self
    }

    /// Standard output goes to a file.
    pub(crate) fn stdout_to(mut self, file: File) -> Self {
        self.stdout = Some(file);
        self
    }

    /// Starts without standard input, as a shell's `<&-` does.
    pub(crate) fn stdin_closed(mut self) -> Self {
        self.redirections.push("<&-");
        self
    }

    /// Standard error goes where standard output goes, as with a shell's `2>&1`.
    pub(crate) fn stderr_to_stdout(mut self) -> Self {
        self.redirections.push("2>&1");
        self
    }

    /// Starts without standard output, as a shell's `>&-` does.
    pub(crate) fn stdout_closed(mut self) -> Self {
        self.redirections.push(">&-");
        self
    }

    /// It may have so many files and sockets open and no more, and so may each process that it starts.
    pub(crate) fn open_files(mut self, most: u32) -> Self {
        self.open_files = Some(most);
        self
    }

    /// It starts with a signal ignored, as what a script has in its background does.
    pub(crate) fn ignoring(mut self, signal: &'static str) -> Self {
        self.ignored = Some(signal);
        self
    }

    /// The kernel answers these system calls as one that does not have them.
    pub(crate) fn on_a_kernel_without(mut self, calls: &[i64]) -> Self {
        self.unknown_calls = calls.to_vec();
        self
    }

    /// Runs it to its end.
    #[track_caller]
    pub(crate) fn run(self) -> Finished {
        self.spawn().wait()
    }

    /// Starts it.
    pub(crate) fn spawn(self) -> Running {
        let mut command = if self.redirections.is_empty() && self.open_files.is_none() && self.ignored.is_none() {
            Command::new(WRUN)
        } else {
            let limit = self.open_files.map(|most| format!("ulimit -n {most} && ")).unwrap_or_default();
            let trap = self.ignored.map(|signal| format!("trap '' {signal} && ")).unwrap_or_default();
            let mut shell = Command::new("/bin/sh");
            shell.arg("-c").arg(format!("{limit}{trap}exec \"$0\" \"$@\" {}", self.redirections.join(" "))).arg(WRUN);
            shell
        };
        command.args(&self.args).env_clear().envs(self.env).current_dir(self.folder.0.path());
        // coverage builds write their counters there
        command.envs(std::env::var_os("LLVM_PROFILE_FILE").map(|file| ("LLVM_PROFILE_FILE", file)));
        command.stdin(match self.stdin {
            Input::Null => Stdio::null(),
            Input::Bytes(_) | Input::Open => Stdio::piped(),
        });
        command.stdout(self.stdout.map_or_else(Stdio::piped, Stdio::from)).stderr(Stdio::piped());
        let unknown = self.unknown_calls;
        let mut child = if unknown.is_empty() {
            command.spawn().expect("the program starts")
        } else {
            // the filter is this thread's, and of all that it starts
            let spawn = move || {
                let rules = unknown.into_iter().map(|call| (call, vec![])).collect();
                let unknown = SeccompAction::Errno(libc::ENOSYS.cast_unsigned());
                let arch = std::env::consts::ARCH.try_into().expect("a known architecture");
                let filter = SeccompFilter::new(rules, SeccompAction::Allow, unknown, arch).expect("a filter");
                seccompiler::apply_filter(&BpfProgram::try_from(filter).expect("a filter")).expect("seccomp");
                command.spawn().expect("the program starts")
            };
            std::thread::spawn(spawn).join().expect("the thread ends")
        };

        let pid = Pid::from_child(&child);
        let stdin = child.stdin.take().inspect(|pipe| do_not_block(pipe));
        let (to_write, ends) = match self.stdin {
            Input::Bytes(bytes) => (bytes, true),
            Input::Null | Input::Open => (vec![], false),
        };
        let mut stdin = Pipe { stdin, to_write, written: 0, ends };
        stdin.end_if_done();
        Running {
            command: self.args.iter().fold("wrun".to_owned(), |text, arg| text + " " + &arg.to_string_lossy()),
            _folder: self.folder,
            ended: rustix::process::pidfd_open(pid, PidfdFlags::empty()).expect("a handle of the process"),
            stdin,
            stdout: Stream::new(child.stdout.take().map(OwnedFd::from)),
            stderr: Stream::new(child.stderr.take().map(OwnedFd::from)),
            child,
            status: None,
            deadline: Instant::now() + DEADLINE,
        }
    }
}

fn do_not_block(pipe: impl AsFd) {
    rustix::fs::fcntl_setfl(&pipe, OFlags::NONBLOCK).expect("a pipe");
}

/// A program that was started. It is killed when it is dropped.
pub(crate) struct Running {
    command: String,
    /// Is there as long as the program is.
    _folder: Folder,
    child: Child,
    /// Readable when the process has ended.
    ended: OwnedFd,
    status: Option<ExitStatus>,
    stdin: Pipe,
    stdout: Stream,
    stderr: Stream,
    deadline: Instant,
}

/// What is still to be written to standard input.
struct Pipe {
    stdin: Option<ChildStdin>,
    to_write: Vec<u8>,
    written: usize,
    ends: bool,
}

impl Pipe {
    fn is_done(&self) -> bool {
        self.written == self.to_write.len()
    }

    fn write(&mut self) {
        let Some(pipe) = &mut self.stdin else { return };
        match pipe.write(&self.to_write[self.written..]) {
            Ok(written) => self.written += written,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
            // it wants no more; whether that is right shows in what it prints
            Err(_) => self.written = self.to_write.len(),
        }
        self.end_if_done();
    }

    fn end_if_done(&mut self) {
        if self.ends && self.is_done() {
            self.stdin = None;
        }
    }
}

/// What came out so far.
struct Stream {
    pipe: Option<File>,
    bytes: Vec<u8>,
    /// How many of the bytes were taken as lines.
    taken: usize,
    /// Whether nothing is read now.
    paused: bool,
}

impl Stream {
    fn new(pipe: Option<OwnedFd>) -> Self {
        let pipe = pipe.map(File::from).inspect(|pipe| do_not_block(pipe));
        Self { pipe, bytes: vec![], taken: 0, paused: false }
    }

    fn read(&mut self) {
        let Some(pipe) = &mut self.pipe else { return };
        let mut chunk = vec![0; 64 << 10];
        match pipe.read(&mut chunk) {
            Ok(0) => self.pipe = None,
            Ok(length) => self.bytes.extend_from_slice(&chunk[..length]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => panic!("could not read what the program prints: {error}"),
        }
    }

    fn has_line(&self) -> bool {
        self.bytes[self.taken..].contains(&b'\n')
    }

    fn take_line(&mut self) -> Option<String> {
        let rest = &self.bytes[self.taken..];
        let length = rest.iter().position(|byte| *byte == b'\n')?;
        let line = String::from_utf8_lossy(&rest[..length]).into_owned();
        self.taken += length + 1;
        Some(line)
    }
}

impl Running {
    /// Writes bytes to standard input.
    #[track_caller]
    pub(crate) fn write(&mut self, bytes: impl AsRef<[u8]>) {
        assert!(self.stdin.stdin.is_some(), "standard input is not open: `stdin_open` makes it so");
        self.stdin.to_write.extend_from_slice(bytes.as_ref());
        self.until("it to read its input", |running| running.stdin.is_done());
    }

    /// Gives bytes to standard input, to be written whenever it takes some.
    pub(crate) fn write_later(&mut self, bytes: impl AsRef<[u8]>) {
        self.stdin.to_write.extend_from_slice(bytes.as_ref());
    }

    /// How much of that has not been taken yet.
    pub(crate) fn unwritten(&self) -> usize {
        self.stdin.to_write.len() - self.stdin.written
    }

    /// Waits until standard input takes no more, for half a second.
    #[track_caller]
    pub(crate) fn until_input_stalls(&mut self) {
        let mut before = usize::MAX;
        while self.unwritten() != before {
            before = self.unwritten();
            let patience = Instant::now() + Duration::from_millis(500);
            self.until("its input to be taken", |running| running.unwritten() != before || Instant::now() >= patience);
        }
    }

    /// Waits until something is the case that it does not tell itself.
    #[track_caller]
    pub(crate) fn until_holds(&mut self, what: &str, holds: impl Fn() -> bool) {
        self.until(what, |_| holds());
    }

    /// Waits until what is seen has not changed for half a second.
    #[track_caller]
    pub(crate) fn until_stable(&mut self, what: &str, see: impl Fn() -> String) {
        let mut before = None;
        while before != Some(see()) {
            before = Some(see());
            let patience = Instant::now() + Duration::from_millis(500);
            self.until(&format!("{what} to be the same"), |_| before != Some(see()) || Instant::now() >= patience);
        }
    }

    /// Writes a line to standard input.
    #[track_caller]
    pub(crate) fn write_line(&mut self, line: impl AsRef<str>) {
        self.write(format!("{}\n", line.as_ref()));
    }

    /// Ends standard input.
    pub(crate) fn close_stdin(&mut self) {
        self.stdin.ends = true;
        self.stdin.end_if_done();
    }

    /// The next line of standard output, without its end.
    #[track_caller]
    pub(crate) fn stdout_line(&mut self) -> String {
        self.stdout.paused = false;
        self.until("a line on stdout", |running| running.stdout.has_line() || running.stdout.pipe.is_none());
        self.stdout.take_line().unwrap_or_else(|| self.fail("there is no further line on stdout"))
    }

    /// The next line of standard error, without its end.
    #[track_caller]
    pub(crate) fn stderr_line(&mut self) -> String {
        self.until("a line on stderr", |running| running.stderr.has_line() || running.stderr.pipe.is_none());
        self.stderr.take_line().unwrap_or_else(|| self.fail("there is no further line on stderr"))
    }

    /// The next line of standard error that has this text in it; those before it are skipped.
    #[track_caller]
    pub(crate) fn stderr_line_with(&mut self, text: &str) -> String {
        loop {
            let line = self.stderr_line();
            if line.contains(text) {
                return line;
            }
        }
    }

    /// Reads nothing of standard output until [`Running::stdout_line`] or [`Running::close_stdout`]: the pipe fills up.
    pub(crate) fn pause_stdout(&mut self) {
        self.stdout.paused = true;
    }

    /// Reads nothing of standard error until [`Running::resume_stderr`]: the pipe fills up.
    pub(crate) fn pause_stderr(&mut self) {
        self.stderr.paused = true;
    }

    /// Reads standard error again.
    pub(crate) fn resume_stderr(&mut self) {
        self.stderr.paused = false;
    }

    /// Reads no more of standard output, as `head` does when it has its lines.
    pub(crate) fn close_stdout(&mut self) {
        self.stdout.pipe = None;
    }

    /// Waits until the program itself has ended, whatever is still to be read of it.
    #[track_caller]
    pub(crate) fn until_ended(&mut self) {
        self.until("its end", |running| running.status.is_some());
    }

    /// Its process.
    pub(crate) fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// Sends a signal to it.
    pub(crate) fn signal(&self, signal: Signal) {
        rustix::process::pidfd_send_signal(&self.ended, signal).expect("it is there");
    }

    /// Waits for its end, and for the end of all that may still write to its output.
    #[track_caller]
    pub(crate) fn wait(mut self) -> Finished {
        self.until("its end", |running| {
            running.status.is_some() && running.stdout.pipe.is_none() && running.stderr.pipe.is_none()
        });
        Finished {
            command: self.command.clone(),
            status: self.status.expect("it has ended"),
            stdout: std::mem::take(&mut self.stdout.bytes),
            stderr: std::mem::take(&mut self.stderr.bytes),
        }
    }

    /// Moves bytes in and out until something is the case.
    #[track_caller]
    fn until(&mut self, what: &str, done: impl Fn(&Self) -> bool) {
        while !done(self) {
            let left = self.deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                self.fail(&format!("after {DEADLINE:?} still waiting for {what}"));
            }
            // what is waited for may also be a moment
            let ready = self.poll(left.min(Duration::from_millis(100)));
            if ready[0] {
                self.status = self.child.try_wait().expect("it is our child");
            }
            if ready[1] {
                self.stdin.write();
            }
            if ready[2] {
                self.stdout.read();
            }
            if ready[3] {
                self.stderr.read();
            }
        }
    }

    /// Which are ready: the end, stdin, stdout, stderr.
    fn poll(&self, timeout: Duration) -> [bool; 4] {
        let ended = self.status.is_none().then(|| (0, PollFd::new(&self.ended, PollFlags::IN)));
        let stdin = self.stdin.stdin.as_ref().filter(|_| !self.stdin.is_done());
        let stdin = stdin.map(|pipe| (1, PollFd::new(pipe, PollFlags::OUT)));
        let stdout = self.stdout.pipe.as_ref().filter(|_| !self.stdout.paused);
        let stdout = stdout.map(|pipe| (2, PollFd::new(pipe, PollFlags::IN)));
        let stderr = self.stderr.pipe.as_ref().filter(|_| !self.stderr.paused);
        let stderr = stderr.map(|pipe| (3, PollFd::new(pipe, PollFlags::IN)));
        let (names, mut fds): (Vec<usize>, Vec<_>) = [ended, stdin, stdout, stderr].into_iter().flatten().unzip();
        let timeout = Timespec::try_from(timeout).expect("a minute");
        rustix::event::poll(&mut fds, Some(&timeout)).expect("descriptors");
        let mut ready = [false; 4];
        for (name, fd) in names.into_iter().zip(fds) {
            ready[name] = !fd.revents().is_empty();
        }
        ready
    }

    #[track_caller]
    fn fail(&mut self, why: &str) -> ! {
        let _ = self.child.kill();
        panic!("{why}\n{}", transcript(&self.command, None, &self.stdout.bytes, &self.stderr.bytes));
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.status.is_none() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}
