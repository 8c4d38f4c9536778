//! The command line: flags, help, and what they become.

mod ci;
mod cluster;
mod command;
mod threads;
mod watch;

use std::{fs::File, path::PathBuf, time::Duration};

use clap::{
    Args, Parser, Subcommand, ValueEnum,
    builder::{OsStringValueParser, TypedValueParser},
};
use wrun::{
    Buffer, Cache, Error, Isolation,
    grant::{DirGrant, Grants, HttpGrant, TcpGrant, parse_env},
    limits::{Bytes, CompileLimits, Limits, parse_duration},
};

pub(crate) use self::{
    ci::{CiArgs, CiCommand, CiRunArgs, Color, NoTests, ProgressMode},
    cluster::{ClusterArgs, LISTEN},
    command::{ExecArgs, ForkArgs, SpawnArgs},
    threads::{Output, ThreadsArgs, print_aside},
    watch::WatchArgs,
};

/// Run WebAssembly guests in parallel, each in a sandbox
#[derive(Debug, Parser)]
#[command(name = "wrun", version = VERSION, propagate_version = false, max_term_width = 100)]
#[command(after_long_help = EXIT_CODES)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
    /// How wrun writes about itself on standard error
    #[arg(long, global = true, value_enum, default_value_t, help_heading = "Output")]
    pub(crate) log_format: LogFormat,
    /// Say what happens inside, for bug reports
    #[arg(short, long, global = true, help_heading = "Output")]
    pub(crate) verbose: bool,
}

const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), " (wasmtime 48)");

const EXIT_CODES: &str = "\
Exit codes: the guest's own, or
    2  usage or configuration          126  not a runnable guest
   70  every worker failed             127  no such guest
   98  address in use                  134  trap
  123  another limit, or protocol      137  memory limit, or killed
  124  time or fuel limit            128+n  ended by signal n
  125  wrun could not do it";

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    /// Lines for people
    #[default]
    Text,
    /// One JSON object a line
    Json,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Run(RunArgs),
    Spawn(Box<SpawnArgs>),
    Exec(Box<ExecArgs>),
    Fork(Box<ForkArgs>),
    Cluster(Box<ClusterArgs>),
    Threads(Box<ThreadsArgs>),
    Watch(Box<WatchArgs>),
    Ci(Box<CiArgs>),
    Inspect(InspectArgs),
    Compile(CompileArgs),
    Doctor(DoctorArgs),
}

/// Run one command guest in the foreground
///
/// Standard input, output and error are the guest's. It gets its arguments, and nothing else that is not granted. It
/// runs in this process unless --isolation says otherwise.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  wrun run --dir data:ro --timeout 5s cat.wasm -- data/words.txt")]
pub(crate) struct RunArgs {
    /// The guest: a component, a core module or WAT text; `-` reads it from standard input
    pub(crate) guest: PathBuf,
    /// The guest's arguments, handed over as they are
    #[arg(last = true)]
    pub(crate) args: Vec<String>,
    #[command(flatten)]
    pub(crate) grants: GrantArgs,
    /// What stands between the guest and the host
    #[arg(long, value_enum, default_value_t = IsolationArg::Thread, help_heading = "Grants")]
    pub(crate) isolation: IsolationArg,
    #[command(flatten)]
    pub(crate) limits: LimitArgs,
    /// The longest that the guest may take, such as `500ms` or `1m30s` [default: no limit]
    #[arg(long, value_parser = parse_duration, value_name = "TIME", help_heading = "Limits")]
    pub(crate) timeout: Option<Duration>,
    #[command(flatten)]
    pub(crate) cache: CacheArgs,
    #[command(flatten)]
    pub(crate) compile: CompileLimitArgs,
    /// The guest is a file that `wrun compile -o` made: trust it as a native program
    #[arg(long, help_heading = "Code")]
    pub(crate) precompiled: bool,
    /// Write how it ended as one JSON object, to standard error or to FILE
    #[arg(long, num_args = 0..=1, require_equals = true, value_name = "FILE", help_heading = "Output")]
    // clap's own parser of paths refuses the empty one, which stands for no file
    #[arg(default_missing_value = "", value_parser = OsStringValueParser::new().map(PathBuf::from))]
    pub(crate) json: Option<PathBuf>,
}

/// Say what a guest is, what it asks for, and which modes can run it
///
/// Of a folder: what `wrun watch` would serve of it, and why not the rest. Exits with 2 when an app would not be served.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  wrun inspect --json echo.wasm")]
pub(crate) struct InspectArgs {
    /// The guest, or a folder; `-` reads a guest from standard input
    pub(crate) guest: PathBuf,
    /// As one JSON object
    #[arg(long, help_heading = "Output")]
    pub(crate) json: bool,
}

/// Compile a guest ahead of its first run
///
/// Into the cache, whose entry's path is printed, or with `-o` into a file for `wrun run --precompiled`.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  wrun compile hello.wasm -o hello.cwasm && wrun run --precompiled hello.cwasm")]
pub(crate) struct CompileArgs {
    /// The guest; `-` reads it from standard input
    pub(crate) guest: PathBuf,
    /// Write the code to FILE instead
    #[arg(short, long, value_name = "FILE", conflicts_with = "no_cache", help_heading = "Code")]
    pub(crate) output: Option<PathBuf>,
    /// Compile checks into it, for `--interrupt epoch`
    #[arg(long, help_heading = "Code")]
    pub(crate) epoch: bool,
    /// Compile metering into it, for `--fuel`
    #[arg(long, help_heading = "Code")]
    pub(crate) fuel: bool,
    #[command(flatten)]
    pub(crate) cache: CacheArgs,
    #[command(flatten)]
    pub(crate) limits: CompileLimitArgs,
}

/// Say which walls stand between a guest and this system, and prove each
///
/// Native code in a worker's place tries what no guest should be able to do, with one wall left standing at a time.
/// Exits with 125 when `--isolation jail` would refuse to run anything here.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  wrun doctor --json")]
pub(crate) struct DoctorArgs {
    /// As one JSON object
    #[arg(long, help_heading = "Output")]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Grants")]
pub(crate) struct GrantArgs {
    /// A folder the guest may use, read-write or read-only
    #[arg(long = "dir", value_name = "HOST[::GUEST][:ro]")]
    dirs: Vec<DirGrant>,
    /// A variable for the guest's environment; a name alone passes on wrun's own value
    #[arg(long = "env", value_name = "NAME[=VALUE]", value_parser = parse_env)]
    env: Vec<(String, String)>,
    /// Pass on all variables that wrun itself was started with; --env beats them
    #[arg(long)]
    inherit_env: bool,
    /// A host the guest may send HTTP requests to; without a port 80 for http and 443 for https
    #[arg(long = "http", value_name = "HOST[:PORT]")]
    http: Vec<HttpGrant>,
    /// An address the guest may open TCP connections to
    #[arg(long = "tcp", value_name = "HOST:PORT")]
    tcp: Vec<TcpGrant>,
}

/// The largest file for a buffer, so that one without an end has one.
const BUFFER_MAX: Bytes = Bytes::mib(8 << 10);

/// What guests have windows of.
#[derive(Debug, Args)]
#[command(next_help_heading = "Grants")]
pub(crate) struct BufferArgs {
    /// A file that guests may have windows of under this name, without a copy for each: it is read once, as it is now
    #[arg(long = "buffer", value_name = "NAME=FILE", value_parser = parse_buffer)]
    buffers: Vec<(String, PathBuf)>,
}

impl BufferArgs {
    /// Reads the files.
    pub(crate) fn read(&self) -> Result<Vec<(String, Buffer)>, Error> {
        let read = |(name, path): &(String, PathBuf)| {
            let buffer = File::open(path).and_then(|file| Buffer::read(&file, BUFFER_MAX));
            let buffer = buffer.map_err(|error| {
                Error::Usage(format!("could not read `{}` for the buffer `{name}`: {error}", path.display()))
            });
            Ok((name.clone(), buffer?))
        };
        self.buffers.iter().map(read).collect()
    }
}

fn parse_buffer(text: &str) -> Result<(String, PathBuf), String> {
    match text.split_once('=') {
        Some((name, path)) if !name.is_empty() && !path.is_empty() => Ok((name.into(), path.into())),
        _ => Err(format!("expected `NAME=FILE` such as `words=words.txt`, found `{text}`")),
    }
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Limits")]
pub(crate) struct LimitArgs {
    /// The most memory that one instance may have
    #[arg(long, value_name = "SIZE", default_value = "256MiB")]
    memory: Bytes,
    /// How much fuel a run or a task may use, about one unit an instruction [default: not metered]
    #[arg(long, value_name = "N")]
    fuel: Option<u64>,
    /// The stack of one instance
    #[arg(long, value_name = "SIZE", default_value = "512KiB", value_parser = parse_stack)]
    stack: Bytes,
    /// The most files that one instance may hold open; not with `--isolation thread`
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    open_files: u32,
    /// The largest file that it may write, one that its output is sent to included; not with `--isolation thread`
    #[arg(long, value_name = "SIZE", default_value = "1GiB")]
    file_size: Bytes,
    /// The most threads that it may have at once beside its main thread, when it can have some
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=1000))]
    threads: u32,
}

/// What is compiled without being asked twice.
#[derive(Debug, Args)]
#[command(next_help_heading = "Compiling")]
pub(crate) struct CompileLimitArgs {
    /// The longest that compiling the guest may take, and the most CPU time
    #[arg(long = "compile-time", id = "compile-time", value_parser = parse_duration, value_name = "TIME", default_value = "5m")]
    time: Duration,
    /// The most memory that compiling it may take
    #[arg(long = "compile-memory", id = "compile-memory", value_name = "SIZE", default_value = "4GiB")]
    memory: Bytes,
    /// The most functions that it may have
    #[arg(long = "compile-functions", id = "compile-functions", value_name = "N", default_value_t = CompileLimits::default().functions)]
    functions: u32,
    /// The most local variables that one function may have
    #[arg(long = "compile-locals", id = "compile-locals", value_name = "N", default_value_t = CompileLimits::default().locals)]
    locals: u32,
    /// The largest function, in its binary form
    #[arg(long = "compile-body", id = "compile-body", value_name = "SIZE", default_value_t = CompileLimits::default().body)]
    body: Bytes,
    /// How deep blocks may be nested in a function
    #[arg(long = "compile-nesting", id = "compile-nesting", value_name = "N", default_value_t = CompileLimits::default().nesting)]
    nesting: u32,
}

impl CompileLimitArgs {
    pub(crate) fn limits(&self) -> CompileLimits {
        CompileLimits {
            time: self.time,
            memory: self.memory,
            functions: self.functions,
            locals: self.locals,
            body: self.body,
            nesting: self.nesting,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum IsolationArg {
    /// The engine alone, in wrun's own process
    Thread,
    /// A process of its own, with every wall that the system has
    Process,
    /// The same, or nothing when a wall is missing: see `wrun doctor`
    Jail,
}

impl From<IsolationArg> for Isolation {
    fn from(isolation: IsolationArg) -> Self {
        match isolation {
            IsolationArg::Thread => Self::Thread,
            IsolationArg::Process => Self::Process,
            IsolationArg::Jail => Self::Jail,
        }
    }
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Code")]
pub(crate) struct CacheArgs {
    /// Where compiled code is kept [default: `$XDG_CACHE_HOME/wrun` or `~/.cache/wrun`]
    #[arg(long, value_name = "DIR")]
    cache_dir: Option<PathBuf>,
    /// Keep no compiled code
    #[arg(long, conflicts_with = "cache_dir")]
    no_cache: bool,
}

impl GrantArgs {
    pub(crate) fn grants(self) -> Grants {
        let mut env = self.env;
        if self.inherit_env {
            // what is not UTF-8 cannot be told to a guest
            let text = |text: std::ffi::OsString| text.into_string().ok();
            let all = std::env::vars_os().filter_map(|(name, value)| Some((text(name)?, text(value)?)));
            let others = all.filter(|(name, _)| !env.iter().any(|(given, _)| given == name));
            env = others.chain(env.clone()).collect();
        }
        Grants { dirs: self.dirs, env, http: self.http, tcp: self.tcp }
    }
}

impl LimitArgs {
    pub(crate) fn limits(&self, timeout: Option<Duration>, message_max: Bytes) -> Limits {
        Limits {
            memory: self.memory,
            timeout,
            fuel: self.fuel,
            stack: self.stack,
            message_max,
            open_files: self.open_files,
            file_size: self.file_size,
            threads: self.threads,
        }
    }
}

impl CacheArgs {
    pub(crate) fn cache(&self) -> Cache {
        if self.no_cache { Cache::none() } else { Cache::at(self.cache_dir.as_deref()) }
    }
}

/// Below the smallest no program starts; above the largest a thousand instances would not fit an address space.
fn parse_stack(text: &str) -> Result<Bytes, String> {
    let (min, max) = (Bytes::kib(16), Bytes::mib(256));
    match text.parse::<Bytes>()? {
        size if size < min || size > max => Err(format!("expected {min} to {max}, found {size}")),
        size => Ok(size),
    }
}
