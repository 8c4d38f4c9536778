//! `wrun spawn`, `exec` and `fork`: their flags, and the commands that they describe.

use std::{fs::File, path::Path, path::PathBuf, time::Duration};

use clap::Args;
use wrun::{
    Command, Error, Signal,
    command::Stdio,
    limits::{Bytes, parse_duration},
    message::Message,
};

use super::{BufferArgs, CacheArgs, CompileLimitArgs, GrantArgs, IsolationArg, LimitArgs};

/// Run one guest in a process of its own, with its output as it comes
///
/// Its standard streams are wrun's own, unless they are sent elsewhere. It ends with wrun, whatever ends that: Ctrl-C
/// reaches its process once; SIGTERM ends its input where that comes through a pipe, and after --grace its process gets
/// the --kill-signal; a second signal ends it at once. wrun exits as the guest did.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  wrun spawn --timeout 5s --dir .:ro cat.wasm -- README.md\n  \
    wrun spawn --json hello.wasm")]
pub(crate) struct SpawnArgs {
    #[command(flatten)]
    pub(crate) child: ChildArgs,
    #[command(flatten)]
    stdio: StdioArgs,
    /// Write what happens to standard output, one JSON object a line; the guest's output is in it, through pipes
    #[arg(long, help_heading = "Output")]
    pub(crate) json: bool,
}

/// Run one guest to its end, and print what it printed
///
/// As `wrun spawn`, but the output is collected, and the guest is ended when there is too much of it. What was collected
/// is printed all the same. wrun exits as the guest did.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  wrun exec --json hello.wasm\n  wrun exec --input data.txt cat.wasm")]
pub(crate) struct ExecArgs {
    #[command(flatten)]
    pub(crate) child: ChildArgs,
    /// What the guest reads from its standard input; `-` is wrun's own [default: nothing]
    #[arg(long, value_name = "FILE", help_heading = "Streams")]
    input: Option<PathBuf>,
    /// How much of each of standard output and error is collected; a guest that writes more is ended
    #[arg(long, value_name = "SIZE", default_value = "1MiB", help_heading = "Limits")]
    stdout_max: Bytes,
    /// Print one JSON object: `{"stdout":…,"stderr":…,"outcome":…}`
    #[arg(long, help_heading = "Output")]
    pub(crate) json: bool,
}

/// Run one guest in a process of its own, with a mailbox: JSON lines in, JSON lines out
///
/// Each line of standard input is a message to the guest, one JSON value. What it sends comes on standard output, one line
/// each, as it is and in order. A handler (`wrun:guest/handler`) replies to each message; a command receives and sends
/// through `wrun:guest/mailbox`. The input waits when the guest is slower, and the guest finds its mailbox full when
/// nobody reads. The end of the input disconnects, and lets the guest finish.
///
/// What the guest prints goes to standard error. A line that is no message is reported there and skipped; wrun then exits
/// with 123, unless the guest has a code of its own. Signals are as for `wrun spawn`; SIGTERM disconnects.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  echo '{\"data\":[1,2,3]}' | wrun fork data-processor.wasm")]
pub(crate) struct ForkArgs {
    #[command(flatten)]
    pub(crate) child: ChildArgs,
    #[command(flatten)]
    stdio: StdioArgs,
    /// The longest message, either way
    #[arg(long, value_name = "SIZE", default_value = "1MiB", help_heading = "Limits")]
    message_max: Bytes,
}

/// What the three have in common.
#[derive(Debug, Args)]
pub(crate) struct ChildArgs {
    /// The guest: a component, a core module or WAT text; `-` reads it from standard input
    pub(crate) guest: PathBuf,
    /// The guest's arguments, handed over as they are
    #[arg(last = true)]
    args: Vec<String>,
    /// What the guest takes for its own name [default: GUEST]
    #[arg(long, value_name = "NAME")]
    argv0: Option<String>,
    /// The folder that the guest starts in, by its name in the guest; it must lie in one granted with --dir
    #[arg(long, value_name = "DIR", help_heading = "Grants")]
    cwd: Option<String>,
    #[command(flatten)]
    grants: GrantArgs,
    #[command(flatten)]
    buffers: BufferArgs,
    /// What stands between the guest and the host; it is a process always
    #[arg(long, value_enum, default_value_t = IsolationArg::Process, help_heading = "Grants")]
    isolation: IsolationArg,
    #[command(flatten)]
    limits: LimitArgs,
    /// The longest that the guest may take, such as `500ms` or `1m30s` [default: no limit]
    #[arg(long, value_parser = parse_duration, value_name = "TIME", help_heading = "Limits")]
    timeout: Option<Duration>,
    /// What its process gets when its time is over, its output too much, or its grace time over
    #[arg(long, value_name = "SIGNAL", default_value_t = Signal::TERM, help_heading = "Limits")]
    kill_signal: Signal,
    /// How long it may take to end when it is told to; SIGKILL comes as much later than the --kill-signal
    #[arg(long, value_parser = parse_duration, value_name = "TIME", default_value = "10s", help_heading = "Limits")]
    grace: Duration,
    /// The JSON value that `worker.get-data` answers
    #[arg(long, value_name = "JSON", default_value = "null", help_heading = "Grants")]
    data: String,
    #[command(flatten)]
    cache: CacheArgs,
    #[command(flatten)]
    compile: CompileLimitArgs,
}

/// Where the standard streams lead.
#[derive(Debug, Args)]
#[command(next_help_heading = "Streams")]
struct StdioArgs {
    /// `inherit` (wrun's own), `null`, `pipe` (wrun's own, through a pipe) or a file; of `fork`, `null` or a file
    #[arg(long, value_name = "WHAT", value_parser = parse_stream)]
    stdin: Option<Stream>,
    /// `inherit` (wrun's own; its standard error, of `fork`), `null`, `pipe` (wrun's own, through a pipe; not of `fork`)
    /// or a file, which is made or emptied
    #[arg(long, value_name = "WHAT", value_parser = parse_stream)]
    stdout: Option<Stream>,
    /// As --stdout
    #[arg(long, value_name = "WHAT", value_parser = parse_stream)]
    stderr: Option<Stream>,
}

#[derive(Debug, Clone)]
enum Stream {
    Inherit,
    Null,
    Pipe,
    File(PathBuf),
}

fn parse_stream(text: &str) -> Result<Stream, String> {
    Ok(match text {
        "inherit" => Stream::Inherit,
        "null" => Stream::Null,
        "pipe" => Stream::Pipe,
        "" => return Err("expected `inherit`, `null`, `pipe` or a file".into()),
        path => Stream::File(path.into()),
    })
}

impl Stream {
    fn input(self) -> Result<Stdio, Error> {
        Ok(match self {
            Self::Inherit => Stdio::inherit(),
            Self::Null => Stdio::null(),
            Self::Pipe => Stdio::piped(),
            Self::File(path) => open(&path, File::options().read(true))?,
        })
    }

    fn output(self) -> Result<Stdio, Error> {
        Ok(match self {
            Self::Inherit => Stdio::inherit(),
            Self::Null => Stdio::null(),
            Self::Pipe => Stdio::piped(),
            Self::File(path) => open(&path, File::options().write(true).create(true).truncate(true))?,
        })
    }
}

fn open(path: &Path, options: &std::fs::OpenOptions) -> Result<Stdio, Error> {
    let file =
        options.open(path).map_err(|error| Error::Usage(format!("could not open `{}`: {error}", path.display())))?;
    Ok(file.into())
}

impl ChildArgs {
    pub(super) fn command(self, message_max: Bytes) -> Result<Command, Error> {
        let data = Message::check(self.data.as_bytes(), message_max.as_usize())
            .map_err(|error| Error::Usage(format!("expected JSON for `--data`, but it is {error}")))?;
        let mut command = Command::new(self.guest);
        command
            .args(self.args)
            .grants(self.grants.grants())
            .limits(self.limits.limits(self.timeout, message_max))
            .isolation(self.isolation.into())
            .cache(self.cache.cache())
            .compile_limits(self.compile.limits())
            .kill_signal(self.kill_signal)
            .grace(self.grace)
            .data(data);
        for (name, buffer) in self.buffers.read()? {
            command.buffer(name, &buffer);
        }
        if let Some(name) = self.argv0 {
            command.arg0(name);
        }
        if let Some(dir) = self.cwd {
            command.current_dir(dir);
        }
        Ok(command)
    }

    /// Two cannot read the same input.
    pub(super) fn reads_input(&self) -> bool {
        self.guest == Path::new("-")
    }
}

const TAKEN: &str = "standard input has the guest: expected another input for it, or a file for the guest";

impl SpawnArgs {
    /// The command that the flags describe.
    pub(crate) fn command(self) -> Result<Command, Error> {
        let reads_input = self.child.reads_input();
        let mut command = self.child.command(Bytes::mib(1))?;
        let stdin = self.stdio.stdin.unwrap_or(if reads_input { Stream::Null } else { Stream::Inherit });
        if reads_input && matches!(stdin, Stream::Inherit | Stream::Pipe) {
            return Err(Error::Usage(TAKEN.into()));
        }
        command.stdin(stdin.input()?);
        let json = self.json;
        let output = |stream: Option<Stream>| match stream {
            // standard output has the events
            None | Some(Stream::Inherit) if json => Stream::Pipe.output(),
            None => Stream::Inherit.output(),
            Some(stream) => stream.output(),
        };
        command.stdout(output(self.stdio.stdout)?).stderr(output(self.stdio.stderr)?);
        Ok(command)
    }
}

impl ExecArgs {
    /// The command that the flags describe.
    pub(crate) fn command(self) -> Result<Command, Error> {
        let reads_input = self.child.reads_input();
        let mut command = self.child.command(Bytes::mib(1))?;
        command.output_max(self.stdout_max);
        match self.input {
            None => {}
            Some(path) if path == Path::new("-") => {
                if reads_input {
                    return Err(Error::Usage(TAKEN.into()));
                }
                command.stdin(Stdio::inherit());
            }
            Some(path) => _ = command.stdin(Stream::File(path).input()?),
        }
        Ok(command)
    }
}

impl ForkArgs {
    /// The command that the flags describe.
    pub(crate) fn command(self) -> Result<Command, Error> {
        if self.child.reads_input() {
            return Err(Error::Usage("expected a file for the guest: standard input has the messages".into()));
        }
        let mut command = self.child.command(self.message_max)?;
        match self.stdio.stdin {
            None => {}
            Some(Stream::Inherit | Stream::Pipe) => {
                return Err(Error::Usage("expected `null` or a file: standard input has the messages".into()));
            }
            Some(stream) => _ = command.stdin(stream.input()?),
        }
        let output = |stream: Option<Stream>| match stream {
            Some(Stream::Pipe) => {
                let expected = "expected `inherit`, `null` or a file: standard output has the messages";
                Err(Error::Usage(expected.into()))
            }
            None | Some(Stream::Inherit) => {
                let stderr = std::os::fd::AsFd::as_fd(&std::io::stderr()).try_clone_to_owned();
                Ok(stderr.map_err(|source| Error::Io { what: "share standard error", source })?.into())
            }
            Some(stream) => stream.output(),
        };
        command.stdout(output(self.stdio.stdout)?).stderr(output(self.stdio.stderr)?);
        Ok(command)
    }
}
