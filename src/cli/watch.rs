//! `wrun watch`: its flags, and the folder that they describe.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use clap::Args;
use wrun::{
    Error,
    cluster::Builder as Pool,
    limits::{Bytes, parse_duration},
    watch::Builder,
};

use super::{
    CacheArgs, CompileLimitArgs, IsolationArg, LimitArgs,
    cluster::{ClientArgs, LISTEN, parse_listen},
};

/// Serve the guests in a folder, each as it is dropped there
///
/// `NAME.wasm` or `NAME.wat` is served at `/NAME`, by worker processes of its own; the rest of the path is passed on. A
/// guest that is replaced is started beside the old one and takes over when it is ready, without a request being lost.
/// One that does not work is told of, and the old one stays. One that is removed finishes what it has. `GET /` lists
/// what is live.
///
/// `NAME.toml` says what an app may touch and spend, and where it is. Most keys are named as the flags of `wrun
/// cluster`: `workers`, `timeout`, `memory`, `dir`, `env`, `http`, `tcp`; and there are `route` or `host`, `lazy`, `disabled`. Nothing is granted that
/// is not granted there.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  wrun watch apps/ --listen 127.0.0.1:3000")]
pub(crate) struct WatchArgs {
    /// The folder
    pub(crate) folder: PathBuf,
    /// How many worker processes each app has, unless its file says otherwise
    #[arg(short, long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024), help_heading = "Apps")]
    workers: u32,
    /// Start apps with their first request, unless their files say otherwise
    #[arg(long, help_heading = "Apps")]
    lazy: bool,
    /// How long what is in flight may take when its version was taken over from, or after a polite stop
    #[arg(long, value_parser = parse_duration, value_name = "TIME", default_value = "10s", help_heading = "Apps")]
    grace: Duration,
    /// How long a worker may go without a heartbeat
    #[arg(long, value_parser = parse_duration, value_name = "TIME", default_value = "5s", help_heading = "Apps")]
    heartbeat: Duration,
    /// Look at the folder so often, and wait for no events: for file systems that have none
    #[arg(long, value_parser = parse_duration, value_name = "TIME", help_heading = "Apps")]
    poll: Option<Duration>,
    /// Serve this address: `127.0.0.1:3000`, `[::1]:3000`, or a port of 127.0.0.1; port 0 is any that is free
    #[arg(long, value_name = "ADDR", value_parser = parse_listen, default_value_t = LISTEN, help_heading = "Port")]
    listen: SocketAddr,
    #[command(flatten)]
    pub(crate) clients: ClientArgs,
    /// What stands between apps and the host, and between clients and the host
    #[arg(long, value_enum, default_value_t = IsolationArg::Process, help_heading = "Limits")]
    isolation: IsolationArg,
    #[command(flatten)]
    limits: LimitArgs,
    /// The longest that a request may take; `0s` = no limit
    #[arg(long, value_parser = parse_duration, value_name = "TIME", default_value = "30s", help_heading = "Limits")]
    timeout: Duration,
    /// The longest message to a handler, either way
    #[arg(long, value_name = "SIZE", default_value = "1MiB", help_heading = "Limits")]
    message_max: Bytes,
    /// How many requests of one app may wait; beyond, they get 503
    #[arg(long, value_name = "N", default_value_t = 1024, help_heading = "Limits")]
    queue: u32,
    #[command(flatten)]
    cache: CacheArgs,
    #[command(flatten)]
    compile: CompileLimitArgs,
}

impl WatchArgs {
    /// The folder that the flags describe.
    pub(crate) fn builder(self) -> Result<Builder, Error> {
        if self.poll.is_some_and(|time| time < Duration::from_millis(10)) {
            return Err(Error::Usage("expected 10ms or more between two looks at the folder".into()));
        }
        let timeout = Some(self.timeout).filter(|timeout| !timeout.is_zero());
        let http = self.clients.limits();
        let apps = Pool::for_apps()
            .workers(self.workers)
            .limits(self.limits.limits(timeout, self.message_max))
            .isolation(self.isolation.into())
            .compile_limits(self.compile.limits())
            .cache(self.cache.cache())
            .queue(self.queue as usize)
            .heartbeat(self.heartbeat)
            .grace(self.grace)
            .http(http.clone())
            .trust_proxies(self.clients.trusted.clone());
        Ok(Builder::new(self.folder, self.listen, apps)
            .http(http)
            .lazy(self.lazy)
            .isolation(self.isolation.into())
            .trust_proxies(self.clients.trusted)
            .access_log(self.clients.access_log.is_some())
            .queue(self.queue)
            .grace(self.grace)
            .heartbeat(self.heartbeat)
            .poll(self.poll))
    }
}
