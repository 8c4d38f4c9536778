//! The folder: what is in it, and when that may have changed.
//!
//! Events of the system are hints only: whatever they say, the folder is looked at as it is. Where they are lost or do not
//! come, it is looked at now and then.

use std::{
    collections::BTreeMap,
    fs::File,
    io,
    os::fd::OwnedFd,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use notify::{
    EventKind, RecommendedWatcher, RecursiveMode, Watcher,
    event::{AccessKind, AccessMode, ModifyKind, RenameMode},
};
use rustix::{
    fs::{AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, Stat},
    io::Errno,
};
use tokio::sync::Notify;

use super::settle::{Heard, Stamp};

/// The endings of the files that make an app.
pub(super) const ENDINGS: [&str; 3] = ["wasm", "wat", "toml"];

/// Endings of files that are yet to become others.
const TEMPORARY: [&str; 9] = ["tmp", "temp", "part", "partial", "swp", "swx", "bak", "new", "crdownload"];

/// The longest name of an app.
const NAME_MAX: usize = 64;

/// What is in the folder.
#[derive(Debug, Default)]
pub(super) struct There {
    /// Files that apps are made of.
    pub(super) files: BTreeMap<String, Stamp>,
    /// What is not looked at, with why.
    pub(super) ignored: BTreeMap<String, String>,
}

impl There {
    /// Whether there is a file of an app.
    pub(super) fn has(&self, app: &str) -> bool {
        ENDINGS.iter().any(|ending| self.files.contains_key(&format!("{app}.{ending}")))
    }
}

/// A folder.
#[derive(Debug)]
pub(super) struct Folder {
    pub(super) path: PathBuf,
}

impl Folder {
    /// What is there now. A folder that is not there has nothing in it.
    ///
    /// # Errors
    /// When it cannot be read, or not all of it: a file that could not be looked at is not one that is gone.
    pub(super) fn look(&self) -> io::Result<There> {
        let mut there = There::default();
        let Some(folder) = self.open()? else { return Ok(there) };
        for entry in rustix::fs::Dir::read_from(&folder)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name == "." || name == ".." {
                continue;
            }
            let looked = match app_of(&name) {
                Ok(_) => stamp_of(&folder, &name)?,
                Err(reason) => Err(reason),
            };
            match looked {
                Ok(Some(stamp)) => _ = there.files.insert(name, stamp),
                // gone meanwhile
                Ok(None) => {}
                Err(reason) => _ = there.ignored.insert(name, reason),
            }
        }
        Ok(there)
    }

    /// Opens a file in it that is as it was, and nothing else under its name.
    ///
    /// # Errors
    /// When it is not, or cannot be read.
    pub(super) fn read(&self, name: &str) -> io::Result<File> {
        let folder = self.open()?.ok_or(io::ErrorKind::NotFound)?;
        Ok(open_in(&folder, name, OFlags::RDONLY | OFlags::NONBLOCK)?.into())
    }

    fn open(&self) -> io::Result<Option<OwnedFd>> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        match rustix::fs::openat(CWD, &self.path, flags, Mode::empty()) {
            Ok(folder) => Ok(Some(folder)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Which folder it is: another one may come in its place.
    fn identity(&self) -> Option<(u64, u64)> {
        let stat = rustix::fs::statat(CWD, &self.path, AtFlags::empty()).ok()?;
        Some((stat.st_dev, stat.st_ino))
    }
}

/// Opens what a name in a folder stands for, if that lies in the folder, too.
fn open_in(folder: &OwnedFd, name: &str, flags: OFlags) -> rustix::io::Result<OwnedFd> {
    let within = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    rustix::fs::openat2(folder, name, flags | OFlags::CLOEXEC, Mode::empty(), within)
}

/// The app that a file is part of.
///
/// # Errors
/// Why it is of none.
pub(super) fn app_of(file: &str) -> Result<&str, String> {
    if file.starts_with('.') {
        return Err("its name starts with a dot".into());
    }
    let ending = file.rsplit_once('.').map_or("", |(_, ending)| ending);
    if file.ends_with('~') || file.starts_with('#') || TEMPORARY.contains(&ending) {
        return Err("its name is a temporary one".into());
    }
    let Some((name, _)) = file.rsplit_once('.').filter(|(_, ending)| ENDINGS.contains(ending)) else {
        return Err("it is no `NAME.wasm`, `NAME.wat` or `NAME.toml`".into());
    };
    let is_plain = name.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c));
    if name.is_empty() || name.len() > NAME_MAX || !is_plain {
        return Err(format!("expected a name of at most {NAME_MAX} letters, digits, `-`, `_` and `.`"));
    }
    Ok(name)
}

/// Whether it was perhaps meant for an app, so that somebody should hear why it is none.
pub(super) fn is_meant(file: &str) -> bool {
    !file.starts_with('.') && file.rsplit_once('.').is_some_and(|(_, ending)| ENDINGS.contains(&ending))
}

/// What there is of a file: none when it is gone, or why it is none of an app.
///
/// # Errors
/// When that could not be seen, for a reason that is not the file's.
fn stamp_of(folder: &OwnedFd, name: &str) -> io::Result<Result<Option<Stamp>, String>> {
    let stat = open_in(folder, name, OFlags::PATH).and_then(rustix::fs::fstat);
    let stat = match stat {
        Ok(stat) => stat,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Ok(None)),
        Err(Errno::XDEV) => return Ok(Err("it is a link out of the folder".into())),
        Err(error @ (Errno::ACCESS | Errno::LOOP | Errno::NOTDIR | Errno::NAMETOOLONG)) => {
            return Ok(Err(io::Error::from(error).to_string()));
        }
        Err(error) => return Err(error.into()),
    };
    Ok(match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => Ok(Some(stamp(&stat))),
        FileType::Directory => Err("it is a folder".into()),
        _ => Err("it is a special file".into()),
    })
}

fn stamp(stat: &Stat) -> Stamp {
    let time = |seconds: i64, nanos: u64| i128::from(seconds) * 1_000_000_000 + i128::from(nanos);
    Stamp {
        device: stat.st_dev,
        inode: stat.st_ino,
        size: stat.st_size.cast_unsigned(),
        modified: time(stat.st_mtime, stat.st_mtime_nsec),
        changed: time(stat.st_ctime, stat.st_ctime_nsec),
    }
}

/// How long a file has been as it is.
pub(super) fn age(stamp: &Stamp) -> Duration {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let last = u64::try_from(stamp.modified.max(stamp.changed)).unwrap_or(0);
    now.saturating_sub(Duration::from_nanos(last))
}

/// What was heard since it was asked for last.
#[derive(Debug, Default)]
pub(super) struct News {
    pub(super) heard: BTreeMap<String, Heard>,
    /// Some of it was lost.
    pub(super) lost: bool,
}

/// Names that are remembered until they are asked for. Beyond, all is as good as lost.
const HEARD_MAX: usize = 10_000;

#[derive(Debug, Default)]
struct Ear {
    news: Mutex<News>,
    came: Notify,
}

impl Ear {
    fn news(&self) -> MutexGuard<'_, News> {
        // it is whole after every use
        self.news.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn hear(&self, event: notify::Result<notify::Event>) {
        let mut news = self.news();
        match event {
            Ok(event) if !event.need_rescan() => {
                let heard = match event.kind {
                    EventKind::Modify(ModifyKind::Data(_)) => Some(Heard::Written),
                    EventKind::Access(AccessKind::Close(AccessMode::Write))
                    | EventKind::Modify(ModifyKind::Name(RenameMode::To)) => Some(Heard::Closed),
                    // one that is made and not written to may be a link: that it is there is no sign of a writer
                    _ => None,
                };
                let names = event.paths.iter().filter_map(|path| path.file_name()?.to_str());
                news.heard.extend(names.filter_map(|name| Some((name.into(), heard?))));
                if news.heard.len() > HEARD_MAX {
                    news.heard.clear();
                    news.lost = true;
                }
            }
            _ => news.lost = true,
        }
        drop(news);
        self.came.notify_one();
    }
}

/// Hears of changes in a folder.
pub(super) struct Ears {
    ear: Arc<Ear>,
    watched: Option<(RecommendedWatcher, (u64, u64))>,
}

impl Ears {
    pub(super) fn new() -> Self {
        Self { ear: Arc::default(), watched: None }
    }

    /// Sees that the folder is watched that is there now. Whether events come from it.
    ///
    /// # Errors
    /// When the system has no more watches.
    pub(super) fn attach(&mut self, folder: &Folder) -> Result<bool, String> {
        let identity = folder.identity();
        if identity == self.watched.as_ref().map(|(_, identity)| *identity) {
            return Ok(identity.is_some());
        }
        self.watched = None;
        let Some(identity) = identity else { return Ok(false) };
        let ear = self.ear.clone();
        let mut watcher =
            notify::recommended_watcher(move |event| ear.hear(event)).map_err(|error| error.to_string())?;
        watcher.watch(&folder.path, RecursiveMode::NonRecursive).map_err(|error| error.to_string())?;
        self.watched = Some((watcher, identity));
        Ok(true)
    }

    /// Waits until something is heard. Cancel-safe.
    pub(super) async fn changed(&self) {
        self.ear.came.notified().await;
    }

    /// What was heard.
    pub(super) fn news(&self) -> News {
        std::mem::take(&mut *self.ear.news())
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn files_are_of_apps_or_ignored_for_a_reason() {
        for (file, app) in [("a.wasm", "a"), ("a.b-c_1.wat", "a.b-c_1"), ("a.toml", "a"), ("a.wasm.toml", "a.wasm")] {
            assert_eq!(app_of(file), Ok(app));
            assert!(is_meant(file));
        }
        for (file, reason) in [
            (".a.wasm", "dot"),
            ("a.wasm~", "temporary"),
            ("#a.wasm#", "temporary"),
            ("a.wasm.tmp", "temporary"),
            ("a.wasm.part", "temporary"),
            ("a.txt", "NAME.wasm"),
            ("a", "NAME.wasm"),
            ("a b.wasm", "expected a name"),
            ("ä.wasm", "expected a name"),
        ] {
            let error = app_of(file).expect_err("it is of none");
            assert!(error.contains(reason), "{file}: {error}");
        }
        assert!(app_of(&format!("{}.wasm", "x".repeat(NAME_MAX + 1))).is_err());
        assert!(is_meant("a b.wasm") && !is_meant(".a.wasm") && !is_meant("a.txt"));
    }

    #[test]
    fn links_lead_nowhere_outside() {
        let outside = tempfile::tempdir().expect("a folder");
        let inside = tempfile::tempdir().expect("a folder");
        std::fs::write(outside.path().join("x.wasm"), "x").expect("written");
        std::fs::create_dir(inside.path().join("..data")).expect("made");
        std::fs::write(inside.path().join("..data/in.wasm"), "in").expect("written");
        let link = |to: &Path, name: &str| std::os::unix::fs::symlink(to, inside.path().join(name)).expect("a link");
        link(Path::new("..data/in.wasm"), "in.wasm");
        link(&outside.path().join("x.wasm"), "out.wasm");
        link(Path::new("/proc/self/exe"), "self.wasm");
        link(Path::new("nowhere"), "broken.wasm");
        link(Path::new("loop.wasm"), "loop.wasm");
        std::fs::create_dir(inside.path().join("folder.wasm")).expect("made");
        let folder = Folder { path: inside.path().into() };
        let there = folder.look().expect("it can be read");
        assert_eq!(there.files.keys().collect::<Vec<_>>(), ["in.wasm"]);
        assert!(folder.read("in.wasm").is_ok() && folder.read("out.wasm").is_err());
        let ignored: Vec<_> = there.ignored.iter().map(|(name, why)| (name.as_str(), why.as_str())).collect();
        assert_eq!(ignored[0], ("..data", "its name starts with a dot"));
        assert_eq!(ignored[1], ("folder.wasm", "it is a folder"));
        assert_eq!(ignored[2].0, "loop.wasm");
        assert_eq!(ignored[3], ("out.wasm", "it is a link out of the folder"));
        assert_eq!(ignored[4], ("self.wasm", "it is a link out of the folder"));
        drop(inside);
        assert!(folder.look().expect("no folder is an empty one").files.is_empty());
    }
}
