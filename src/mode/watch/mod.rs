//! `wrun watch`: a folder whose guests are live.
//!
//! | file | what |
//! | --- | --- |
//! | `folder` | what is in it, and when that may have changed |
//! | `settle` | when a file is whole |
//! | `settings` | what its `NAME.toml` says of an app |
//! | `version` | a guest and its settings, as they were read |
//! | `app` | what becomes of an app: which version is live, which is to be, what was wrong |
//! | `router` | the process that has the port |
//! | `run` | all of it together |
//!
//! Each version of an app is a [`Cluster`](crate::Cluster) of its own, whose workers take connections from the router and
//! from nobody else. A new one is started beside the old, and when all its workers are ready the router is told: from then
//! on requests go there. What the old one has begun it finishes.

mod app;
mod folder;
mod router;
mod run;
mod settings;
mod settle;
mod version;

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use ipnet::IpNet;
use serde::Serialize;

pub use self::run::run;
use self::{folder::Folder, version::Version};
use crate::{
    Error,
    event::{self, AccessRecord},
    limits::HttpLimits,
    mode::cluster,
    process::Isolation,
};

/// How a folder is watched.
#[derive(Debug, Clone)]
#[must_use = "nothing is watched before it runs"]
pub struct Builder {
    folder: PathBuf,
    listen: SocketAddr,
    http: HttpLimits,
    apps: cluster::Builder,
    lazy: bool,
    isolation: Isolation,
    trusted: Vec<IpNet>,
    access_log: bool,
    queue: u32,
    grace: Duration,
    heartbeat: Duration,
    poll: Option<Duration>,
}

impl Builder {
    /// Watches a folder, and serves what is in it at this address. `apps` is what holds for each app unless its own file
    /// says otherwise; what it says of a guest, an address and grants is not used.
    pub fn new(folder: impl Into<PathBuf>, listen: SocketAddr, apps: cluster::Builder) -> Self {
        Self {
            folder: folder.into(),
            listen,
            http: HttpLimits::default(),
            apps,
            lazy: false,
            isolation: Isolation::Process,
            trusted: vec![],
            access_log: false,
            queue: 1024,
            grace: Duration::from_secs(10),
            heartbeat: Duration::from_secs(5),
            poll: None,
        }
    }

    /// What bounds its clients.
    pub fn http(mut self, limits: HttpLimits) -> Self {
        self.http = limits;
        self
    }

    /// Starts apps at their first request; default when they come.
    pub fn lazy(mut self, lazy: bool) -> Self {
        self.lazy = lazy;
        self
    }

    /// What is between the router and the host; default [`Isolation::Process`].
    pub fn isolation(mut self, isolation: Isolation) -> Self {
        self.isolation = isolation;
        self
    }

    /// Whose forwarded headers are believed; see [`cluster::Builder::trust_proxies`].
    pub fn trust_proxies(mut self, proxies: impl IntoIterator<Item = IpNet>) -> Self {
        self.trusted = proxies.into_iter().collect();
        self
    }

    /// Tells of each request, as [`Event::Access`]; default not.
    pub fn access_log(mut self, wanted: bool) -> Self {
        self.access_log = wanted;
        self
    }

    /// How many requests may wait for one app that is being started; default 1,024.
    pub fn queue(mut self, requests: u32) -> Self {
        self.queue = requests;
        self
    }

    /// How long what is in flight may take after an end was asked for, or when a version was taken over from; default
    /// 10 s.
    pub fn grace(mut self, time: Duration) -> Self {
        self.grace = time;
        self
    }

    /// How long the router may go without a heartbeat before it is replaced; default 5 s.
    pub fn heartbeat(mut self, time: Duration) -> Self {
        self.heartbeat = time;
        self
    }

    /// Looks at the folder so often and waits for no events, for file systems that have none; default events, and a look
    /// every 2 s in case some were lost.
    pub fn poll(mut self, time: Option<Duration>) -> Self {
        self.poll = time;
        self
    }
}

/// What happens in a folder, and in the workers of its apps.
///
/// As JSON: one flat object with the tag `event`, and with `app` and `version` where there is one.
#[derive(Debug, Clone, Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Event {
    /// The router takes connections.
    Listening {
        /// Where; with the real port when any was asked for.
        address: SocketAddr,
    },
    /// A version is being compiled and started.
    Starting {
        /// The app.
        app: String,
        /// The version.
        version: String,
    },
    /// Requests go to a version from now on.
    Live {
        /// The app.
        app: String,
        /// The version.
        version: String,
        /// How long that took since its files were read, in milliseconds.
        took_ms: u64,
        /// The version that was live until now.
        #[serde(skip_serializing_if = "Option::is_none")]
        former: Option<String>,
    },
    /// A version is there, and is started by the first request.
    Asleep {
        /// The app.
        app: String,
        /// The version.
        version: String,
    },
    /// A version is not taken; what was live before is live still.
    Refused {
        /// The app.
        app: String,
        /// The version, when its files could be read.
        #[serde(skip_serializing_if = "Option::is_none")]
        version: Option<String>,
        /// Why.
        reason: String,
    },
    /// A version crashed again and again when it was new, and the one before it is started in its place.
    RolledBack {
        /// The app.
        app: String,
        /// The version that crashed.
        version: String,
        /// The one that takes its place.
        to: String,
        /// How it crashed.
        reason: String,
    },
    /// A version that was live has failed, and there is none to go back to.
    Failed {
        /// The app.
        app: String,
        /// The version.
        version: String,
        /// How.
        reason: String,
    },
    /// An app is no more: its files are gone, or it was disabled.
    Removed {
        /// The app.
        app: String,
    },
    /// A file that was perhaps meant for an app is not used.
    Ignored {
        /// Its name.
        file: String,
        /// Why.
        reason: String,
    },
    /// A request was answered; only when an access log is wanted.
    Access {
        /// What it was, and how it went.
        #[serde(flatten)]
        record: Box<AccessRecord>,
    },
    /// Something went wrong that ends nothing.
    Error {
        /// What, in words.
        message: String,
    },
    /// Something happened in the workers of a version.
    #[serde(untagged)]
    Worker {
        /// The app.
        app: String,
        /// The version.
        version: String,
        /// What.
        #[serde(flatten)]
        event: event::Event,
    },
    /// Something happened to the router.
    #[serde(untagged)]
    Router {
        /// Always `router`.
        part: &'static str,
        /// What.
        #[serde(flatten)]
        event: event::Event,
    },
}

/// What would be served of a folder, and what not.
#[derive(Debug, Clone, Serialize)]
pub struct Inspected {
    /// The apps, by name.
    pub apps: Vec<Found>,
    /// What is not looked at, by name, with why.
    pub ignored: Vec<(String, String)>,
}

/// An app that would be served, or not.
#[derive(Debug, Clone, Serialize)]
pub struct Found {
    /// Its name.
    pub name: String,
    /// Its version.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// Where it would be.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub at: Option<String>,
    /// Why it would not be served.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub refused: Option<String>,
}

/// Says what of a folder would be served, without compiling or running anything.
///
/// # Errors
/// When it cannot be read.
pub fn inspect(folder: &Path) -> Result<Inspected, Error> {
    let folder = Folder { path: folder.into() };
    let there = folder.look().map_err(Error::io("read the folder"))?;
    let apps = cluster::Builder::for_apps();
    let mut places = vec![];
    let found = version::names(&there).map(|name| {
        let found = Found { name: name.into(), version: None, at: None, refused: None };
        match Version::read(&folder, &there, name, &apps) {
            Ok(None) => Found { refused: Some("it is being changed".into()), ..found },
            Ok(Some(version)) => {
                let at = version.place_name();
                let taken = places.contains(&at).then(|| format!("another app is at `{at}` already"));
                let refused = version.would_not_run().or(taken);
                if refused.is_none() {
                    places.push(at.clone());
                }
                Found { version: Some(version.id), at: Some(at), refused, ..found }
            }
            Err(reason) => Found { refused: Some(reason), ..found },
        }
    });
    let apps = found.collect();
    let shadowed = version::shadowed(&there).map(|(file, reason)| (file, reason.to_owned()));
    let mut ignored: Vec<_> = there.ignored.clone().into_iter().chain(shadowed).collect();
    ignored.sort();
    Ok(Inspected { apps, ignored })
}
