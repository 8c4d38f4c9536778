//! A folder in which apps are put, and the program that watches it.

use std::{fs, path::PathBuf};

use rustix::process::{Pid, Signal};
use serde_json::Value;

use crate::{
    client::{Response, Server},
    supervision::{event, events},
    wrun::{Folder, Wrun},
};

/// A folder in which apps are put, and the program that watches it.
pub(crate) struct Apps {
    pub(crate) folder: Folder,
    pub(crate) server: Server,
}

impl Apps {
    #[track_caller]
    pub(crate) fn new() -> Self {
        Self::with(|wrun| wrun)
    }

    /// With more flags.
    #[track_caller]
    pub(crate) fn with(change: impl FnOnce(Wrun) -> Wrun) -> Self {
        Self::of(Folder::new().folder("apps"), change)
    }

    /// Of a folder that has something in it.
    #[track_caller]
    pub(crate) fn of(folder: Folder, change: impl FnOnce(Wrun) -> Wrun) -> Self {
        let wrun = change(folder.wrun(["watch", "apps", "--listen", "0", "--log-format", "json"]));
        Self { folder, server: Server::start(wrun) }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path("apps").join(name)
    }

    /// Puts a file in its place at once, as a careful installer does.
    pub(crate) fn put(&self, name: &str, content: impl AsRef<[u8]>) {
        let aside = self.path(&format!(".{name}.tmp"));
        fs::write(&aside, content).unwrap();
        fs::rename(aside, self.path(name)).unwrap();
    }

    /// The next event of this name about an app.
    #[track_caller]
    pub(crate) fn told(&mut self, name: &str, app: &str) -> Value {
        loop {
            let event = event(&mut self.server, name);
            if event["app"] == app {
                return event;
            }
        }
    }

    /// Puts a guest, and waits until it is live.
    #[track_caller]
    pub(crate) fn live(&mut self, app: &str, guest: impl AsRef<[u8]>) -> Value {
        self.put(&format!("{app}.wasm"), guest);
        self.told("live", app)
    }

    #[track_caller]
    pub(crate) fn get(&self, path: &str) -> Response {
        self.server.get(path)
    }

    /// What the list says of an app.
    #[track_caller]
    pub(crate) fn listed(&self, app: &str) -> Value {
        let list = self.get("/").json();
        list["apps"].as_array().unwrap().iter().find(|entry| entry["name"] == app).cloned().unwrap_or_default()
    }
}

pub(crate) fn guest(path: &str) -> Vec<u8> {
    fs::read(path).unwrap()
}

/// The same guest as another file: a custom section more.
pub(crate) fn variant(path: &str, number: u8) -> Vec<u8> {
    // section 0, two bytes: a name of one, and nothing else
    [guest(path), vec![0, 2, 1, b'a' + number]].concat()
}

#[track_caller]
pub(crate) fn kind(response: &Response) -> (u16, String) {
    (response.status, response.json()["error"]["kind"].as_str().unwrap_or_default().into())
}

/// Ends the program; all events of this name that were not taken.
#[track_caller]
pub(crate) fn events_of(apps: Apps, name: &str) -> Vec<Value> {
    apps.server.signal(Signal::TERM);
    let finished = apps.server.running.wait().code(0);
    events(&finished).into_iter().filter(|event| event["event"] == name).collect()
}

/// How many requests these processes have begun, but for the router, which is the first.
pub(crate) fn begun(workers: &[Pid]) -> u64 {
    let of = |worker: &Pid| {
        let files = fs::read_dir(format!("/proc/{}/fd", worker.as_raw_pid())).ok()?.flatten();
        let is_page = |path: &PathBuf| fs::read_link(path).is_ok_and(|to| to.ends_with("memfd:wrun-page (deleted)"));
        let page = files.map(|file| file.path()).find(is_page)?;
        let words = fs::read(page).ok()?;
        Some(u64::from_ne_bytes(words[16..24].try_into().ok()?))
    };
    let mut workers = workers.to_vec();
    workers.sort_by_key(|pid| pid.as_raw_pid());
    workers.iter().skip(1).filter_map(of).sum()
}
