//! One guest with a process of its own, as Node's `child_process` has it: started with streams ([`Command::spawn`]), run
//! to its end with its output collected ([`Command::output`], [`exec`]), or started with a mailbox ([`Command::fork`],
//! [`fork()`]). And [`Run`], which runs one in the foreground, if need be in this very process.
//!
//! What [`std::process`] and `tokio::process` have is here under their names. All that waits is `async`, and must be
//! called inside of a tokio runtime with its I/O and its time enabled; what ends in `_blocking` needs no runtime, and must
//! not be called inside of one. Starting a guest reads its file and looks for its code on the thread that asks.
//!
//! Dropping a future that waits loses nothing where it says *cancel-safe*. A child that is dropped is ended.
//!
//! # What Node's `child_process` has
//!
//! | in Node | here |
//! | --- | --- |
//! | `spawn(file, args)`, events `spawn`, `exit`, `close`, `error` | [`Command::spawn`], `wrun spawn`; with `--json` events `fork`, `exit`, `close`; what could not be started is an error |
//! | `execFile`, promisified, with `encoding`, `maxBuffer` | [`Command::output`], `wrun exec`, [`Command::output_max`]; bytes, and in JSON a text or base64 |
//! | `exec(line)`, `shell` | no: there is no shell in the sandbox, and a line that is split is how arguments are smuggled; arguments are a list |
//! | `fork`, `send`, events `message`, `disconnect`; `disconnect()` | [`Command::fork`], `wrun fork`; [`Fork::send`], [`Fork::recv`], [`Fork::request`], [`Fork::events`], [`Fork::disconnect`] |
//! | `send` that answers `false` | [`SendError::Full`](crate::message::SendError::Full), and [`Fork::ready`] |
//! | `process.send`, `process.on("message")`, `connected`, in the child | `wrun:guest/mailbox`, or a handler |
//! | `spawnSync`, `execSync`, `input` | [`Command::spawn_blocking`], [`Command::output_blocking`], `wrun exec --input` |
//! | `cwd` | [`Command::current_dir`]: a folder within one that is granted |
//! | `env` (all, by default) | [`Command::env`]: none by default |
//! | `argv0` | [`Command::arg0`] |
//! | `stdio`: `pipe`, `inherit`, `ignore`, a stream; `silent` | [`Stdio`]: piped, inherited, null, anything that is open |
//! | `stdio` from 3 on, `overlapped`, an `ipc` slot | no: a guest has no descriptors; the mailbox is always beside its streams |
//! | `timeout`, `killSignal` | [`Command::timeout`], [`Command::kill_signal`], [`Command::grace`] |
//! | `signal` (an `AbortSignal`) | drop the child, or what waits for it |
//! | `kill(signal)`, `kill(0)`, `killed`, `exitCode`, `signalCode` | [`Child::kill`], [`Child::is_alive`], and the [`Outcome`] |
//! | `pid`, `spawnfile`, `spawnargs` | [`Child::id`], and what the [`Command`] was given |
//! | `[Symbol.dispose]()` | dropping it |
//! | `ref`, `unref` | nothing waits for a child unless it is asked to |
//! | `execPath`, `execArgv` | [`Command::limits`], [`Command::isolation`]: what a child's engine is made with |
//! | `serialization` | JSON, which is what a guest's contract knows |
//! | `detached` | no: a child does not outlive its parent |
//! | `uid`, `gid` | no: a child has the user of its parent and, in the jail, nothing of what that may do |
//! | handles with `send`, `NODE_CHANNEL_FD` | no: a guest has no sockets but those that it was granted; several guests share a port in a [`Cluster`](crate::Cluster) |
//! | `windowsHide`, `windowsVerbatimArguments` | no: Linux only |
//! | a guest that starts guests | not yet |

mod blocking;
mod child;
pub mod foreground;
mod fork;
mod launch;
mod map;
mod run;

use std::{
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::PathBuf,
    time::Duration,
};

use rustix::fs::{Mode, OFlags};

pub(in crate::mode) use self::launch::LATE;
pub use self::{
    blocking::{BlockingChild, BlockingFork, TimedOut},
    child::{Child, ChildOutput, ChildStdin, Output},
    fork::Fork,
    run::Run,
};
use self::{
    child::Ends,
    launch::{Extra, OnDenied, Settings, Worker},
};
use crate::{
    Error,
    buffer::{self, Buffer},
    child::MapConfig,
    grant::{Denied, DirGrant, Grants, HttpGrant, TcpGrant},
    limits::{Bytes, CompileLimits, Limits},
    message::Message,
    outcome::Outcome,
    process::{Isolation, Program},
    sandbox::{Cache, Code, Shape},
    signal::Signal,
};

/// How much of each stream is collected when nothing else is said, as in Node.
pub const OUTPUT_MAX: Bytes = Bytes::mib(1);

/// How long a guest may take to end after a polite stop when nothing else is said.
pub const GRACE: Duration = Duration::from_secs(10);

/// A guest to be started in a process of its own, in the manner of [`std::process::Command`].
///
/// It has nothing at first: no arguments, no environment, no folder. It can be started any number of times; what was
/// compiled once is found again.
///
/// ```standalone_crate
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use wrun::Command;
///
/// wrun::init(); // first thing in main: children are this program, started again
/// # let guest = guest_artifacts::ARGS;
/// # let rt = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
/// # rt.block_on(async {
/// let output = Command::new(guest).arg("two words").env("GREETING", "hi").output().await?;
/// assert_eq!(output.outcome.end.exit_code(), 0);
/// assert!(output.stdout.ends_with(b"\"two words\"],\"env\":{\"GREETING\":\"hi\"}}\n"));
/// # Ok(()) })
/// # }
/// ```
#[derive(Debug)]
#[must_use = "nothing is started before `spawn`, `output` or `fork`"]
pub struct Command {
    settings: Settings,
    stdio: [Option<Stdio>; 3],
    cwd: Option<String>,
    kill_signal: Signal,
    grace: Duration,
    output_max: Bytes,
    data: Message,
}

/// What a standard stream of a guest is.
#[derive(Debug)]
pub struct Stdio(Kind);

#[derive(Debug)]
enum Kind {
    Inherit,
    Null,
    Piped,
    Fd(OwnedFd),
}

impl Stdio {
    /// That of this process.
    #[must_use]
    pub fn inherit() -> Self {
        Self(Kind::Inherit)
    }

    /// Nothing: no input, and output is gone.
    #[must_use]
    pub fn null() -> Self {
        Self(Kind::Null)
    }

    /// A pipe, whose other end is in the [`Child`].
    #[must_use]
    pub fn piped() -> Self {
        Self(Kind::Piped)
    }
}

impl From<File> for Stdio {
    /// A file that is open.
    fn from(file: File) -> Self {
        Self(Kind::Fd(file.into()))
    }
}

impl From<OwnedFd> for Stdio {
    /// Whatever is open.
    fn from(fd: OwnedFd) -> Self {
        Self(Kind::Fd(fd))
    }
}

/// What `Command::start` makes of its standard streams, by their numbers.
type Pipes = [Option<OwnedFd>; 3];

impl Command {
    /// The guest in a file, with [`Isolation::Process`] and the default limits: no time limit.
    pub fn new(guest: impl Into<PathBuf>) -> Self {
        Self {
            settings: Settings::new(guest.into(), Isolation::Process),
            stdio: [None, None, None],
            cwd: None,
            kill_signal: Signal::TERM,
            grace: GRACE,
            output_max: OUTPUT_MAX,
            data: Message::null(),
        }
    }

    /// Adds an argument, handed over as it is.
    pub fn arg(&mut self, arg: impl Into<String>) -> &mut Self {
        self.settings.args.push(arg.into());
        self
    }

    /// Adds arguments.
    pub fn args(&mut self, args: impl IntoIterator<Item = impl Into<String>>) -> &mut Self {
        self.settings.args.extend(args.into_iter().map(Into::into));
        self
    }

    /// What the guest takes for its own name, its first argument; else its path.
    pub fn arg0(&mut self, name: impl Into<String>) -> &mut Self {
        self.settings.argv0 = Some(name.into());
        self
    }

    /// Grants a variable of the environment. The guest sees those and no other.
    pub fn env(&mut self, name: impl Into<String>, value: impl Into<String>) -> &mut Self {
        self.settings.grants.env.push((name.into(), value.into()));
        self
    }

    /// Grants a folder.
    pub fn dir(&mut self, dir: DirGrant) -> &mut Self {
        self.settings.grants.dirs.push(dir);
        self
    }

    /// Grants HTTP requests to a host.
    pub fn http(&mut self, host: HttpGrant) -> &mut Self {
        self.settings.grants.http.push(host);
        self
    }

    /// Grants TCP connections to an address.
    pub fn tcp(&mut self, address: TcpGrant) -> &mut Self {
        self.settings.grants.tcp.push(address);
        self
    }

    /// What the guest may touch, in place of all that was granted before.
    pub fn grants(&mut self, grants: Grants) -> &mut Self {
        self.settings.grants = grants;
        self
    }

    /// The folder that the guest starts in, by its name in the guest. It must lie in one that is granted.
    pub fn current_dir(&mut self, dir: impl Into<String>) -> &mut Self {
        self.cwd = Some(dir.into());
        self
    }

    /// What bounds the guest, in place of all limits that were set before.
    pub fn limits(&mut self, limits: Limits) -> &mut Self {
        self.settings.limits = limits;
        self
    }

    /// The longest that the guest may take, from the start of its process to its end. Default: no limit.
    pub fn timeout(&mut self, timeout: Duration) -> &mut Self {
        self.settings.limits.timeout = Some(timeout);
        self
    }

    /// The most linear memory that the guest may have. Default 256 MiB.
    pub fn memory(&mut self, memory: Bytes) -> &mut Self {
        self.settings.limits.memory = memory;
        self
    }

    /// Its standard input. Default: that of this process; none for [`Command::output`] and [`Command::fork`].
    pub fn stdin(&mut self, stdio: impl Into<Stdio>) -> &mut Self {
        self.stdio[0] = Some(stdio.into());
        self
    }

    /// Its standard output. Default: that of this process; a pipe for [`Command::output`].
    pub fn stdout(&mut self, stdio: impl Into<Stdio>) -> &mut Self {
        self.stdio[1] = Some(stdio.into());
        self
    }

    /// Its standard error. Default: that of this process; a pipe for [`Command::output`].
    pub fn stderr(&mut self, stdio: impl Into<Stdio>) -> &mut Self {
        self.stdio[2] = Some(stdio.into());
        self
    }

    /// How much of each stream [`Command::output`] collects, in bytes. Default 1 MiB. A guest that writes more is ended.
    pub fn output_max(&mut self, max: Bytes) -> &mut Self {
        self.output_max = max;
        self
    }

    /// What the guest's process is sent when its time is over, or its output is too much. Default SIGTERM, which ends it
    /// at once: a guest does not see signals. SIGKILL follows after the grace time.
    pub fn kill_signal(&mut self, signal: Signal) -> &mut Self {
        self.kill_signal = signal;
        self
    }

    /// How long a guest may take to end when it was asked to. Default 10 s.
    pub fn grace(&mut self, grace: Duration) -> &mut Self {
        self.grace = grace;
        self
    }

    /// What `worker.get-data` answers in the guest. Default `null`.
    pub fn data(&mut self, data: Message) -> &mut Self {
        self.data = data;
        self
    }

    /// The workers of a handler that shares its memory; a command that makes threads by itself is told their number, in
    /// `RAYON_NUM_THREADS` and `OMP_NUM_THREADS`, unless it was given such a variable.
    ///
    /// Of each message from the mailbox of such a handler, which one of its workers says it, is a part:
    /// `{"worker":ID,"reply":…}`.
    pub fn workers(&mut self, count: u32) -> &mut Self {
        self.settings.workers.get_or_insert_default().count = count;
        self
    }

    /// Keeps each thread of a guest with [`Command::workers`] on one core.
    pub fn pin(&mut self, pin: bool) -> &mut Self {
        self.settings.workers.get_or_insert_default().pin = pin;
        self
    }

    /// Whether messages are tasks for whichever of the [`Command::workers`] is free: `{"worker":ID,"line":N,"reply":…}` is
    /// the answer to the N-th. By default each worker gets one message, its data, and the group ends when all have answered.
    pub fn tasks(&mut self, tasks: bool) -> &mut Self {
        self.settings.workers.get_or_insert_default().tasks = tasks;
        self
    }

    /// Lets the guest have windows of a buffer, under this name: ranges of it in its own memory, which are not copied for
    /// that. One of the same name is replaced. See `wrun:guest/window`; only components have it.
    pub fn buffer(&mut self, name: impl Into<String>, buffer: &Buffer) -> &mut Self {
        buffer::add(&mut self.settings.buffers, name.into(), buffer);
        self
    }

    /// What stands between the guest and the host. Default [`Isolation::Process`]; it cannot be [`Isolation::Thread`].
    pub fn isolation(&mut self, isolation: Isolation) -> &mut Self {
        self.settings.compiler.isolation = isolation;
        self
    }

    /// Who hears what the guest was refused of the network: each grant that it lacks once, and not without end. Default a
    /// warning. A [`Fork`] has an event for it, too.
    pub fn on_denied(&mut self, hear: impl Fn(&Denied) + Send + Sync + 'static) -> &mut Self {
        self.settings.on_denied = OnDenied::new(hear);
        self
    }

    /// What bounds its compilation.
    pub fn compile_limits(&mut self, limits: CompileLimits) -> &mut Self {
        self.settings.compiler.limits = limits;
        self
    }

    /// Where its compiled code is kept.
    pub fn cache(&mut self, cache: Cache) -> &mut Self {
        self.settings.cache = cache;
        self
    }

    /// The program that children are made of, when it is not this one: a `wrun` of the same version.
    pub fn program(&mut self, path: impl Into<PathBuf>) -> &mut Self {
        self.settings.compiler.program = Program::At(path.into());
        self
    }

    /// Starts the guest. It is ended when the [`Child`] is dropped, or this process ends in whatever way.
    ///
    /// # Errors
    /// When the guest cannot be loaded, or its process cannot be started.
    pub async fn spawn(&mut self) -> Result<Child, Error> {
        self.spawn_with([Kind::Inherit, Kind::Inherit, Kind::Inherit]).await
    }

    /// Runs the guest to its end, and collects what it prints.
    ///
    /// # Errors
    /// As [`Command::spawn`], or when its guest never ran.
    pub async fn output(&mut self) -> Result<Output, Error> {
        self.spawn_for_output().await?.collect(self.output_max).await
    }

    /// As [`Command::spawn`], with the streams of [`Command::output`].
    async fn spawn_for_output(&mut self) -> Result<Child, Error> {
        self.spawn_with([Kind::Null, Kind::Piped, Kind::Piped]).await
    }

    async fn spawn_with(&mut self, defaults: [Kind; 3]) -> Result<Child, Error> {
        let code = self.load().await?;
        let (worker, pipes) = self.start(&code, Mailbox::None, None, defaults)?;
        Ok(Child::new(worker, Ends::of(pipes)?, self.kill_signal, self.grace))
    }

    /// Lets a guest whose fuel is metered end itself at its time limit, so that it is known what it used. One that is blocked
    /// there is ended a little later.
    pub(in crate::mode) fn ends_itself(&mut self) -> &mut Self {
        self.settings.ends_itself = true;
        self
    }

    /// As [`Command::spawn_for_output`], of code that was loaded before.
    pub(in crate::mode) fn spawn_loaded(&mut self, code: &Code) -> Result<Child, Error> {
        self.settings.check()?;
        let (worker, pipes) = self.start(code, Mailbox::None, None, [Kind::Null, Kind::Piped, Kind::Piped])?;
        Ok(Child::new(worker, Ends::of(pipes)?, self.kill_signal, self.grace))
    }

    /// Runs the guest to its end.
    ///
    /// # Errors
    /// As [`Command::output`].
    pub async fn status(&mut self) -> Result<Outcome, Error> {
        self.spawn().await?.wait().await
    }

    /// Starts the guest with a mailbox: a handler, which answers each message, or a command that receives and sends.
    /// Its standard output and error are those of this process.
    ///
    /// # Errors
    /// As [`Command::spawn`], or when the guest is neither.
    pub async fn fork(&mut self) -> Result<Fork, Error> {
        let code = self.load().await?;
        let mailbox = match code.inspection.shape {
            Some(Shape::Handler) if !code.inspection.has_threads() => Mailbox::Handler,
            // workers say which of them it is: what comes is more than a reply
            _ => Mailbox::Command,
        };
        let (worker, pipes) = self.start(&code, mailbox, None, [Kind::Null, Kind::Inherit, Kind::Inherit])?;
        Ok(Fork::new(worker, Ends::of(pipes)?, mailbox, self))
    }

    /// The guest's code, if that can be started.
    async fn load(&self) -> Result<Code, Error> {
        self.settings.check()?;
        if self.settings.compiler.isolation == Isolation::Thread {
            return Err(Error::Usage(
                "a child has a process of its own: expected `process` or `jail` for its isolation".into(),
            ));
        }
        buffer::check(&self.settings.buffers).map_err(Error::Usage)?;
        self.settings.load(self.settings.spec()).await
    }

    /// Starts its process, and answers our ends of its pipes.
    fn start(
        &mut self,
        code: &Code,
        mailbox: Mailbox,
        map: Option<(MapConfig, Option<OwnedFd>)>,
        defaults: [Kind; 3],
    ) -> Result<(Worker, Pipes), Error> {
        let extra = Extra {
            data: self.data.clone(),
            cwd: self.cwd.as_deref().map(|cwd| self.settings.cwd(cwd)).transpose()?,
            mailbox: mailbox != Mailbox::None,
            map,
            kill_signal: self.kill_signal,
            grace: self.grace,
        };
        let (mut theirs, mut ours): (Vec<OwnedFd>, Pipes) = (vec![], [None, None, None]);
        for (number, default) in defaults.into_iter().enumerate() {
            let kind = self.stdio[number].as_ref().map_or(&default, |stdio| &stdio.0);
            let (fd, end) = open(kind, number).map_err(Error::io("open the guest's standard streams"))?;
            theirs.push(fd);
            ours[number] = end;
        }
        let [stdin, stdout, stderr] = [0, 1, 2].map(|number: usize| -> BorrowedFd<'_> { theirs[number].as_fd() });
        Ok((self.settings.start(code, extra, [stdin, stdout, stderr])?, ours))
    }
}

/// Whose messages come through a guest's mailbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mailbox {
    /// Nobody's.
    None,
    /// Those that a command sends.
    Command,
    /// A handler's replies, one for each message.
    Handler,
}

/// The end of a standard stream that goes to the guest, and the other one when that is ours.
fn open(kind: &Kind, number: usize) -> io::Result<(OwnedFd, Option<OwnedFd>)> {
    Ok(match kind {
        Kind::Inherit => {
            let fd = match number {
                0 => io::stdin().as_fd().try_clone_to_owned(),
                1 => io::stdout().as_fd().try_clone_to_owned(),
                _ => io::stderr().as_fd().try_clone_to_owned(),
            };
            (fd?, None)
        }
        Kind::Null => {
            let flags = if number == 0 { OFlags::RDONLY } else { OFlags::WRONLY };
            (rustix::fs::open("/dev/null", flags | OFlags::CLOEXEC, Mode::empty())?, None)
        }
        Kind::Piped => {
            let (reader, writer) = io::pipe()?;
            if number == 0 { (reader.into(), Some(writer.into())) } else { (writer.into(), Some(reader.into())) }
        }
        Kind::Fd(fd) => (fd.try_clone()?, None),
    })
}

/// Runs a guest to its end with these arguments, and collects what it prints: [`Command::output`] with the defaults.
///
/// # Errors
/// As [`Command::output`].
pub async fn exec(
    guest: impl Into<PathBuf>,
    args: impl IntoIterator<Item = impl Into<String>>,
) -> Result<Output, Error> {
    Command::new(guest).args(args).output().await
}

/// Starts a guest with a mailbox: [`Command::fork`] with the defaults.
///
/// Node's example, in which the child maps what it is sent:
///
/// ```standalone_crate
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use wrun::{Signal, message::Message, outcome::{Answer, End}};
///
/// async fn process_large_data(data: &[u32]) -> Result<Vec<u32>, Box<dyn std::error::Error>> {
///     #[derive(serde::Deserialize)]
///     struct Mapped { result: Vec<u32> }
///
///     # let guest = guest_artifacts::DATA_PROCESSOR;
///     let mut child = wrun::fork(guest).await?;
///     let answer = child.request(&Message::of(&serde_json::json!({ "data": data }))?).await?;
///     child.kill(Signal::TERM);
///     assert_eq!(child.wait().await?.end, End::Killed { signal: 15 });
///     match answer {
///         Answer::Reply(reply) => Ok(reply.to::<Mapped>()?.result),
///         other => Err(format!("{other:?}").into()),
///     }
/// }
///
/// wrun::init();
/// # let rt = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
/// # rt.block_on(async {
/// assert_eq!(process_large_data(&[1, 2, 3]).await?, [2, 4, 6]);
/// # Ok(()) })
/// # }
/// ```
///
/// # Errors
/// As [`Command::fork`].
pub async fn fork(guest: impl Into<PathBuf>) -> Result<Fork, Error> {
    Command::new(guest).fork().await
}
