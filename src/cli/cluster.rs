//! `wrun cluster`: its flags, and the pool that they describe.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use clap::{
    Args, ValueEnum,
    builder::{OsStringValueParser, TypedValueParser},
};
use ipnet::IpNet;
use wrun::{
    Cluster, Error, Restart,
    cluster::{Balance, Builder, InstanceLife, Interrupt},
    limits::{Bytes, HttpLimits, parse_duration},
    message::Message,
};

use super::{BufferArgs, CacheArgs, CompileLimitArgs, GrantArgs, IsolationArg, LimitArgs};

/// Where http guests are served when no address is given.
pub(crate) const LISTEN: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 8080);

/// Run a guest as a pool of supervised worker processes, behind one port or fed JSON lines
///
/// An http guest (`wasi:http/incoming-handler`) answers the requests of a port that all workers share. A handler
/// (`wrun:guest/handler`) does so with --listen: a message is posted, the reply is the response. Without --listen, each
/// line of standard input is a task for a handler, one JSON value; the answers come on standard output as lines
/// `{"line":N,"reply":…}` or `{"line":N,"error":{…}}`, and the end of the input drains the pool.
///
/// SIGTERM and SIGINT let what is begun finish, a second one ends it. SIGHUP replaces the workers of a port by ones of
/// the guest as its file is now, without losing a request.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  wrun cluster -w 4 --listen 127.0.0.1:3000 hello-http.wasm\n  \
    seq 20 35 | wrun cluster -w 4 --ordered fib.wasm")]
pub(crate) struct ClusterArgs {
    /// The guest: a component that exports `wasi:http/incoming-handler` or `wrun:guest/handler`, in a file
    pub(crate) guest: PathBuf,
    /// How many worker processes [default: one per core]
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024), help_heading = "Pool")]
    pub(crate) workers: Option<u32>,
    /// What an instance lives for [default: worker for a handler, task for an http guest]
    #[arg(long, value_enum, help_heading = "Pool")]
    pub(crate) instance: Option<InstanceArg>,
    /// For how many tasks or requests an instance of a worker is used [default: no end]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..), help_heading = "Pool")]
    pub(crate) reuse: Option<u64>,
    /// The JSON value that `worker.get-data` answers
    #[arg(long, value_name = "JSON", default_value = "null", help_heading = "Pool")]
    pub(crate) data: String,
    /// Answer lines in the order of the input
    #[arg(long, conflicts_with = "listen", help_heading = "Pool")]
    pub(crate) ordered: bool,
    /// How often a line's task is tried again when its worker dies
    #[arg(long, value_name = "N", default_value_t = 0, conflicts_with = "listen", help_heading = "Pool")]
    pub(crate) retries: u32,
    /// When a dead worker is replaced
    #[arg(long, value_enum, default_value_t, help_heading = "Pool")]
    pub(crate) restart: RestartArg,
    /// How long work in flight may take after a polite stop
    #[arg(long, value_parser = parse_duration, value_name = "TIME", default_value = "10s", help_heading = "Pool")]
    pub(crate) grace: Duration,
    /// How long a worker may go without a heartbeat
    #[arg(long, value_parser = parse_duration, value_name = "TIME", default_value = "5s", help_heading = "Pool")]
    pub(crate) heartbeat: Duration,
    /// How a task that is out of time is ended: with its worker, or by checks compiled into the guest. On a port it is
    /// by checks always
    #[arg(long, value_enum, default_value_t, help_heading = "Pool")]
    pub(crate) interrupt: InterruptArg,
    #[command(flatten)]
    pub(crate) port: PortArgs,
    #[command(flatten)]
    pub(crate) grants: GrantArgs,
    #[command(flatten)]
    pub(crate) buffers: BufferArgs,
    /// What stands between its workers and the host; they are processes always
    #[arg(long, value_enum, default_value_t = IsolationArg::Process, help_heading = "Grants")]
    pub(crate) isolation: IsolationArg,
    #[command(flatten)]
    pub(crate) limits: LimitArgs,
    /// The longest that a task or request may take; `0s` = no limit
    #[arg(long, value_parser = parse_duration, value_name = "TIME", default_value = "30s", help_heading = "Limits")]
    pub(crate) timeout: Duration,
    /// The longest message, either way
    #[arg(long, value_name = "SIZE", default_value = "1MiB", help_heading = "Limits")]
    pub(crate) message_max: Bytes,
    /// How many tasks or requests may wait in the pool; beyond, no more input is read, and requests get 503
    #[arg(long, value_name = "N", default_value_t = 1024, help_heading = "Limits")]
    pub(crate) queue: u32,
    /// How many tasks or requests a worker handles at once, each in an instance of its own [default: 1 for a handler, 64
    /// for an http guest]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024), help_heading = "Limits")]
    pub(crate) concurrency: Option<u32>,
    #[command(flatten)]
    pub(crate) cache: CacheArgs,
    #[command(flatten)]
    pub(crate) compile: CompileLimitArgs,
}

/// How a port is served.
#[derive(Debug, Args)]
#[command(next_help_heading = "Port")]
pub(crate) struct PortArgs {
    /// Serve this address: `127.0.0.1:3000`, `[::1]:3000`, or a port of 127.0.0.1; port 0 is any that is free [default
    /// for an http guest: 127.0.0.1:8080]
    #[arg(long, value_name = "ADDR", value_parser = parse_listen)]
    pub(crate) listen: Option<SocketAddr>,
    /// How connections get to the workers
    #[arg(long, value_enum, default_value_t)]
    balance: BalanceArg,
    /// A path that each worker asks its guest for before it takes connections; no success = it does not
    #[arg(long, value_name = "PATH")]
    probe: Option<String>,
    /// After how many requests a worker is replaced, without losing one [default: never]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    max_requests: Option<u64>,
    /// At how much memory of its process a worker is replaced, without losing a request [default: never]
    #[arg(long, value_name = "SIZE")]
    max_memory: Option<Bytes>,
    #[command(flatten)]
    pub(crate) clients: ClientArgs,
}

/// What bounds the clients of a port, and what is told of them.
#[derive(Debug, Args)]
#[command(next_help_heading = "Port")]
pub(crate) struct ClientArgs {
    /// Write a line for each request, to standard error or to FILE
    #[arg(long, num_args = 0..=1, require_equals = true, value_name = "FILE", default_missing_value = "")]
    // clap's own parser of paths refuses the empty one, which stands for no file
    #[arg(value_parser = OsStringValueParser::new().map(PathBuf::from))]
    pub(crate) access_log: Option<PathBuf>,
    /// Believe the forwarded headers and request ids of this address or network; of all others they are removed
    #[arg(long = "trust-proxy", value_name = "ADDR[/BITS]", value_parser = parse_net)]
    pub(crate) trusted: Vec<IpNet>,
    /// The most bytes of a request's line and headers; beyond: 431
    #[arg(long, value_name = "SIZE", default_value = "64KiB")]
    header_max: Bytes,
    /// The longest request target; beyond: 414
    #[arg(long, value_name = "SIZE", default_value = "8KiB")]
    uri_max: Bytes,
    /// The largest body of a request; beyond: 413. A handler's has --message-max, too
    #[arg(long, value_name = "SIZE", default_value = "64MiB")]
    body_max: Bytes,
    /// How long the head of a request may take, from its first byte; beyond: 408
    #[arg(long, value_parser = parse_duration, value_name = "TIME", default_value = "10s")]
    header_timeout: Duration,
    /// How long a connection may lie idle, or pause within a body
    #[arg(long, value_parser = parse_duration, value_name = "TIME", default_value = "30s")]
    idle_timeout: Duration,
    /// How long a client may take nothing of its response
    #[arg(long, value_parser = parse_duration, value_name = "TIME", default_value = "30s")]
    write_timeout: Duration,
    /// The most connections of one worker; more wait at the port
    #[arg(long, value_name = "N", default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..))]
    connections: u32,
}

impl ClientArgs {
    /// What bounds them.
    pub(crate) fn limits(&self) -> HttpLimits {
        HttpLimits {
            head: self.header_max,
            uri: self.uri_max,
            body: self.body_max,
            head_timeout: self.header_timeout,
            idle_timeout: self.idle_timeout,
            write_timeout: self.write_timeout,
            connections: self.connections,
        }
    }

    /// The file of the access log, when it is not standard error.
    pub(crate) fn log_file(&self) -> Option<PathBuf> {
        self.access_log.clone().filter(|file| !file.as_os_str().is_empty())
    }
}

#[derive(Debug, Clone, Copy, Default, ValueEnum)]
pub(crate) enum InstanceArg {
    /// The worker: what it keeps in memory is there for the next task
    #[default]
    Worker,
    /// One task
    Task,
}

#[derive(Debug, Clone, Copy, Default, ValueEnum)]
pub(crate) enum RestartArg {
    /// Never
    Never,
    /// When it crashed or exited with another code than 0
    OnFailure,
    /// Whenever it is gone
    #[default]
    Always,
}

#[derive(Debug, Clone, Copy, Default, ValueEnum)]
pub(crate) enum InterruptArg {
    /// Kill the worker: its loops run at full speed
    Kill,
    /// Checks in loops: the worker lives on, tight loops are 2 to 5 times slower
    Epoch,
    /// `epoch` when a worker handles several tasks at once, else `kill`
    #[default]
    Auto,
}

#[derive(Debug, Clone, Copy, Default, ValueEnum)]
pub(crate) enum BalanceArg {
    /// All accept from one socket, and who holds more than its share lets others go first
    #[default]
    Shared,
    /// Each slot has a socket of its own, and the kernel spreads connections over them
    Slots,
}

impl ClusterArgs {
    /// The pool that the flags describe.
    pub(crate) fn builder(self) -> Result<Builder, Error> {
        if self.guest == Path::new("-") {
            return Err(Error::Usage("expected a file for the guest: standard input has the tasks".into()));
        }
        let timeout = Some(self.timeout).filter(|timeout| !timeout.is_zero());
        let limits = self.limits.limits(timeout, self.message_max);
        let data = Message::check(self.data.as_bytes(), self.message_max.as_usize())
            .map_err(|error| Error::Usage(format!("expected JSON for `--data`, but it is {error}")))?;
        let port = self.port;
        let mut builder = Cluster::builder(self.guest)
            .limits(limits)
            .grants(self.grants.grants())
            .isolation(self.isolation.into())
            .compile_limits(self.compile.limits())
            .cache(self.cache.cache())
            .data(data)
            .interrupt(match self.interrupt {
                InterruptArg::Kill => Interrupt::Kill,
                InterruptArg::Epoch => Interrupt::Epoch,
                InterruptArg::Auto => Interrupt::Auto,
            })
            .restart(match self.restart {
                RestartArg::Never => Restart::Never,
                RestartArg::OnFailure => Restart::OnFailure,
                RestartArg::Always => Restart::Always,
            })
            .queue(self.queue as usize)
            .retries(self.retries)
            .heartbeat(self.heartbeat)
            .grace(self.grace)
            .http(port.clients.limits())
            .balance(match port.balance {
                BalanceArg::Shared => Balance::Shared,
                BalanceArg::Slots => Balance::Slots,
            })
            .access_log(port.clients.access_log.is_some())
            .trust_proxies(port.clients.trusted);
        for (name, buffer) in self.buffers.read()? {
            builder = builder.buffer(name, &buffer);
        }
        if let Some(workers) = self.workers {
            builder = builder.workers(workers);
        }
        if let Some(life) = self.instance {
            builder = builder.instance(match life {
                InstanceArg::Worker => InstanceLife::Worker,
                InstanceArg::Task => InstanceLife::Task,
            });
        }
        if let Some(uses) = self.reuse {
            builder = builder.reuse(uses);
        }
        if let Some(tasks) = self.concurrency {
            builder = builder.concurrency(tasks);
        }
        if let Some(address) = port.listen {
            builder = builder.listen(address);
        }
        if let Some(path) = port.probe {
            builder = builder.probe(path);
        }
        if let Some(requests) = port.max_requests {
            builder = builder.requests_max(requests);
        }
        if let Some(memory) = port.max_memory {
            builder = builder.process_memory_max(memory);
        }
        Ok(builder)
    }
}

/// An address with its port, or a port of this machine alone.
pub(super) fn parse_listen(text: &str) -> Result<SocketAddr, String> {
    let port = text.strip_prefix("localhost:").or(text.strip_prefix(':')).unwrap_or(text);
    if let Ok(port) = port.parse() {
        return Ok(SocketAddr::new(LISTEN.ip(), port));
    }
    text.parse().map_err(|_| {
        format!("expected `ADDR:PORT` such as `127.0.0.1:3000` or `[::1]:3000`, or a port, found `{text}`")
    })
}

/// A network, or one address.
fn parse_net(text: &str) -> Result<IpNet, String> {
    let address = || text.parse::<IpAddr>().ok().map(IpNet::from);
    text.parse()
        .ok()
        .or_else(address)
        .ok_or_else(|| format!("expected an address or a network such as `10.0.0.1` or `10.0.0.0/8`, found `{text}`"))
}
