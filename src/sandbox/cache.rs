//! Compiled code on disk: written by us, checked when it is read, shared by all processes of one user.
//!
//! A guest is compiled once for an engine; its entry is named by both. The folder belongs to the user alone (0700), or
//! it is not used: machine code from elsewhere would run outside of any sandbox. Entries appear whole (written aside,
//! then renamed), so any number of processes may read and write at once; one that is damaged is compiled again, and one
//! that nobody has needed for a month goes when another comes.

use std::{
    fmt::Write as _,
    fs::{self, File},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::OnceLock,
    time::{Duration, SystemTime},
};

use rustix::fs::MemfdFlags;
use wasmtime::Engine;

use crate::sandbox::{code::Code, engine::EngineSpec, guest::Guest};

/// Where compiled code is kept, or that it is not.
#[derive(Debug, Clone)]
pub struct Cache {
    dir: Option<PathBuf>,
    /// Whether the folder may be used; looked at when it is first needed.
    usable: OnceLock<bool>,
}

/// Where code came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// It was there.
    Cache,
    /// It was compiled.
    Compiler,
}

impl Cache {
    /// The cache in `dir`, or in the user's cache folder (`$XDG_CACHE_HOME/wrun`, `~/.cache/wrun`).
    ///
    /// Nothing is made or looked at before code is needed. A cache that cannot be used safely is then as good as none;
    /// why is logged as a warning.
    #[must_use]
    pub fn at(dir: Option<&Path>) -> Self {
        Self { dir: dir.map(Path::to_path_buf).or_else(default_dir), usable: OnceLock::new() }
    }

    /// No cache: everything is compiled each time.
    #[must_use]
    pub const fn none() -> Self {
        Self { dir: None, usable: OnceLock::new() }
    }

    /// The folder, made if need be; none when there is none that may be used.
    fn dir(&self) -> Option<&Path> {
        let dir = self.dir.as_deref()?;
        let usable = *self.usable.get_or_init(|| {
            let prepared = prepare(dir);
            if let Err(error) = &prepared {
                tracing::warn!("compiled code is not kept: {}: {error}", dir.display());
            }
            prepared.is_ok()
        });
        usable.then_some(dir)
    }

    /// The entry of a guest for an engine, whether it exists or not.
    pub(crate) fn entry(&self, engine: &Engine, guest: &Guest) -> Option<PathBuf> {
        let mut name = String::with_capacity(64 + 1 + 16 + 6);
        for byte in guest.digest() {
            let _ = write!(name, "{byte:02x}");
        }
        name.push('-');
        for byte in &EngineSpec::fingerprint(engine)[..8] {
            let _ = write!(name, "{byte:02x}");
        }
        Some(self.dir()?.join(name + ".cwasm"))
    }

    /// Finds a guest's code, if it is here and whole.
    pub(crate) fn find(entry: &Path) -> Option<Code> {
        let file = File::open(entry).ok()?;
        // its time says when it was last of use, to the day
        if age(&file.metadata().ok()?) >= DAY {
            let _ = file.set_modified(SystemTime::now());
        }
        let code = Code::open(file);
        if code.is_none() {
            tracing::warn!("{} is damaged and will be compiled again", entry.display());
        }
        code
    }

    /// Keeps packed code, and opens it. A folder that cannot be written is no reason to fail: the code then lives in
    /// memory only.
    ///
    /// # Errors
    /// When not even that is possible.
    pub(crate) fn keep(entry: Option<&Path>, packed: &[u8]) -> io::Result<Code> {
        let kept = entry.and_then(|entry| match write_whole(entry, packed) {
            Ok(file) => {
                entry.parent().into_iter().for_each(forget_old);
                Some(file)
            }
            Err(error) => {
                tracing::warn!("compiled code is not kept: {}: {error}", entry.display());
                None
            }
        });
        let file = if let Some(file) = kept {
            file
        } else {
            let mut file = File::from(rustix::fs::memfd_create("wrun-code", MemfdFlags::CLOEXEC)?);
            file.write_all(packed)?;
            file
        };
        Code::open(file).ok_or_else(|| io::Error::other("what was just written is damaged"))
    }
}

const DAY: Duration = Duration::from_hours(24);

/// How long an entry is kept that nobody needs; and what a compiler that was killed has left.
const KEPT_FOR: Duration = Duration::from_hours(30 * 24);

/// Removes what has not been of use for long. Whoever has it open still has it.
fn forget_old(dir: &Path) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    for entry in entries.flatten() {
        let is_ours = entry.path().extension().is_some_and(|ending| ending == "cwasm" || ending == "tmp");
        if is_ours && entry.metadata().is_ok_and(|meta| age(&meta) >= KEPT_FOR) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

fn age(meta: &fs::Metadata) -> Duration {
    meta.modified().ok().and_then(|modified| modified.elapsed().ok()).unwrap_or_default()
}

fn default_dir() -> Option<PathBuf> {
    let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    Some(absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")))?.join("wrun"))
}

/// Makes the folder, or sees that nobody else may write to it.
fn prepare(dir: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    let meta = fs::metadata(dir)?;
    if meta.uid() != rustix::process::geteuid().as_raw() {
        return Err(io::Error::other("the folder belongs to somebody else"));
    }
    if meta.mode() & 0o077 != 0 {
        return Err(io::Error::other(
            "others may enter the folder; `chmod 700` it, or choose another with --cache-dir",
        ));
    }
    Ok(())
}

/// Writes a file so that it appears whole under its name, or not at all; and opens it for reading.
pub(crate) fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<File> {
    let mut unique = [0; 8];
    rustix::rand::getrandom(&mut unique, rustix::rand::GetRandomFlags::empty())?;
    let aside = path.with_extension(format!("{:016x}.tmp", u64::from_ne_bytes(unique)));
    let written = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&aside)
        .and_then(|mut file| file.write_all(bytes))
        .and_then(|()| fs::rename(&aside, path))
        .and_then(|()| File::open(path));
    if written.is_err() {
        let _ = fs::remove_file(&aside);
    }
    written
}
