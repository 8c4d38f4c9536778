//! The files of one attempt: copies of its inputs, folders for its outputs, and what becomes of those.
//!
//! A guest sees copies only, in a folder that is made for one attempt and is gone after it. What it leaves is hostile: only
//! plain files with plain names are taken, and only so much.

use std::{
    collections::{BTreeMap, HashSet},
    ffi::OsStr,
    fs::{self, DirBuilder, File},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use rustix::fs::{Mode, OFlags};

use super::{
    mask::Masks,
    plan::{Job, Output},
};
use crate::{grant::DirGrant, limits::Bytes};

/// The most files that one attempt may leave.
const FILES_MAX: u64 = 10_000;

/// The deepest that folders may be nested.
const DEPTH_MAX: usize = 64;

/// How much of a file is copied at once.
const PIECE: usize = 256 << 10;

/// A folder that is removed with all that is in it when this is dropped.
#[derive(Debug)]
pub(super) struct WorkFolder(pub(super) PathBuf);

impl WorkFolder {
    /// Makes one that only this user can look into.
    pub(super) fn new(path: PathBuf) -> io::Result<Self> {
        DirBuilder::new().mode(0o700).create(&path)?;
        Ok(Self(path))
    }
}

impl Drop for WorkFolder {
    fn drop(&mut self) {
        // what cannot be removed stays in a folder for temporary files
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The files of an attempt.
#[derive(Debug)]
pub(super) struct Stage {
    folder: Option<WorkFolder>,
    /// What the guest has of them.
    pub(super) dirs: Vec<DirGrant>,
}

impl Stage {
    /// Copies what a job gets into a folder that is made for it.
    ///
    /// # Errors
    /// Names what could not be copied.
    pub(super) fn prepare(job: &Job, path: PathBuf) -> Result<Self, String> {
        if job.inputs.is_empty() && job.outputs.is_empty() {
            return Ok(Self { folder: None, dirs: vec![] });
        }
        let cannot = |error: io::Error| format!("could not make a folder for its files: {error}");
        let folder = WorkFolder::new(path).map_err(cannot)?;
        let mut dirs = BTreeMap::<String, DirGrant>::new();
        let mut dir = |guest: &str, read_only: bool| -> Result<PathBuf, String> {
            let guest = guest.trim_end_matches('/');
            let host = folder.0.join(dirs.len().to_string());
            let fresh =
                DirGrant { host: host.clone(), guest: if guest.is_empty() { "/" } else { guest }.into(), read_only };
            let known = dirs.entry(guest.into()).or_insert(fresh);
            if known.host == host {
                fs::create_dir(&host).map_err(cannot)?;
            }
            known.read_only &= read_only;
            Ok(known.host.clone())
        };
        for output in &job.outputs {
            dir(&output.from, false)?;
        }
        for input in &job.inputs {
            let is_folder = fs::metadata(&input.from).map_err(|error| no_input(&input.from, &error))?.is_dir();
            let (guest, name) = match Path::new(&input.to).file_name() {
                Some(name) if !is_folder => (Path::new(&input.to).parent().unwrap_or(Path::new("/")), Some(name)),
                _ => (Path::new(&input.to), None),
            };
            let host = dir(&guest.to_string_lossy(), !input.is_writable)?;
            let to = name.map_or_else(|| host.clone(), |name| host.join(name));
            if is_folder {
                copy_tree(&input.from, &to)?;
            } else {
                copy_input(&input.from, &to, OFlags::empty())?;
            }
        }
        Ok(Self { folder: Some(folder), dirs: dirs.into_values().collect() })
    }

    /// Whether there are any.
    pub(super) fn has_files(&self) -> bool {
        self.folder.is_some()
    }

    /// Whether the guest can write to any of them.
    pub(super) fn is_writable(&self) -> bool {
        self.dirs.iter().any(|dir| !dir.read_only)
    }

    /// Sees that the guest has not written too much.
    ///
    /// # Errors
    /// Says of what it is too much.
    pub(super) fn check(&self, max: Bytes) -> Result<(), String> {
        let mut found = Found::default();
        for dir in self.dirs.iter().filter(|dir| !dir.read_only) {
            // what comes and goes meanwhile is looked at again at the end
            let _ = found.add(&dir.host, 0, &mut |_, _| Ok(()));
            found.fits(max)?;
        }
        Ok(())
    }

    /// Keeps what the guest has left where outputs are declared.
    ///
    /// # Errors
    /// What of it is not taken, or cannot be written.
    pub(super) fn collect(&self, job: &Job, masks: &Masks, owned: &Owned) -> Result<(), Uncollected> {
        if self.folder.is_none() {
            return Ok(());
        }
        for output in &job.outputs {
            let guest = output.from.trim_end_matches('/');
            let Some(dir) = self.dirs.iter().find(|dir| dir.guest == guest) else { continue };
            let mut found = Found::default();
            let refused = |reason| Uncollected::Refused(format!("what it left in `{guest}` is not kept: {reason}"));
            found
                .add(&dir.host, 0, &mut |path, is_folder| {
                    is_plain(path, is_folder).and_then(|()| is_no_secret(path, masks))
                })
                .map_err(refused)?;
            found.fits(output.max).map_err(refused)?;
            if found.files == 0 {
                if output.required {
                    return Err(Uncollected::Refused(format!("expected files in `{guest}`, found none")));
                }
                continue;
            }
            keep(&dir.host, output, masks, owned)?;
        }
        Ok(())
    }
}

/// The folders of outputs that wrun has made, in this run or the one before. It may replace those as a whole; in others it
/// replaces files of the same names, and removes nothing.
#[derive(Debug, Default)]
pub(super) struct Owned(Mutex<HashSet<PathBuf>>);

impl Owned {
    pub(super) fn of(folders: impl IntoIterator<Item = PathBuf>) -> Self {
        Self(Mutex::new(folders.into_iter().collect()))
    }

    pub(super) fn has(&self, folder: &Path) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).contains(folder)
    }

    fn add(&self, folder: &Path) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(folder.to_owned());
    }
}

fn is_no_secret(path: &Path, masks: &Masks) -> Result<(), String> {
    let name = path.file_name().unwrap_or_default().as_encoded_bytes();
    if masks.find(name) { Err("a secret is in the name of a file".into()) } else { Ok(()) }
}

/// Why files are not kept.
#[derive(Debug)]
pub(super) enum Uncollected {
    /// It is the guest's fault.
    Refused(String),
    /// It is not.
    Cannot(String),
}

/// What was found in a folder.
#[derive(Debug, Default)]
struct Found {
    files: u64,
    bytes: u64,
}

impl Found {
    /// Adds what is in a folder, as long as that is not too much anyway.
    fn add(
        &mut self,
        folder: &Path,
        depth: usize,
        check: &mut dyn FnMut(&Path, bool) -> Result<(), String>,
    ) -> Result<(), String> {
        if depth > DEPTH_MAX {
            return Err(format!("its folders are nested deeper than {DEPTH_MAX}"));
        }
        for entry in fs::read_dir(folder).map_err(|error| error.to_string())? {
            let path = entry.map_err(|error| error.to_string())?.path();
            let metadata = fs::symlink_metadata(&path).map_err(|error| error.to_string())?;
            self.files += 1;
            if self.files > FILES_MAX {
                return Ok(());
            }
            check(&path, metadata.is_dir())?;
            if metadata.is_dir() {
                self.add(&path, depth + 1, check)?;
            } else {
                self.bytes = self.bytes.saturating_add(metadata.len());
            }
        }
        Ok(())
    }

    fn fits(&self, max: Bytes) -> Result<(), String> {
        if self.files > FILES_MAX {
            return Err(format!("expected at most {FILES_MAX} files, found more"));
        }
        if self.bytes > max.0 {
            return Err(format!("expected at most {max} of files, found {} bytes", self.bytes));
        }
        Ok(())
    }
}

/// Whether something that a guest has made is taken.
fn is_plain(path: &Path, is_folder: bool) -> Result<(), String> {
    let name = path.file_name().unwrap_or_default();
    let is_text = |name: &OsStr| name.to_str().is_some_and(|name| !name.chars().any(char::is_control));
    if !is_text(name) {
        return Err(format!(
            "expected names without control characters, found `{}`",
            name.display().to_string().escape_debug()
        ));
    }
    let metadata = fs::symlink_metadata(path).map_err(|error| error.to_string())?;
    if !is_folder && !metadata.is_file() {
        let what = if metadata.is_symlink() { "a link" } else { "a special file" };
        return Err(format!("expected files and folders, found {what}: `{}`", name.display()));
    }
    Ok(())
}

/// Puts the files of an output where they are to be.
fn keep(from: &Path, output: &Output, masks: &Masks, owned: &Owned) -> Result<(), Uncollected> {
    let to = &output.to;
    let cannot = |error: io::Error| Uncollected::Cannot(format!("could not write to `{}`: {error}", to.display()));
    let name = to.file_name().ok_or_else(|| Uncollected::Cannot(format!("`{}` is no folder's name", to.display())))?;
    let parent = to.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(parent).map_err(cannot)?;
    let is_there = match fs::symlink_metadata(to) {
        Ok(metadata) if !metadata.is_dir() => {
            return Err(Uncollected::Cannot(format!("expected a folder or nothing at `{}`", to.display())));
        }
        found => found.is_ok(),
    };
    let beside = |ending: &str| parent.join(format!(".{}.{}.{ending}", name.to_string_lossy(), std::process::id()));
    let _ = fs::remove_dir_all(beside("tmp"));
    let aside = WorkFolder::new(beside("tmp")).map_err(cannot)?;
    copy_out(from, &aside.0, masks)?;
    if is_there && !owned.has(to) {
        return merge(&aside.0, to).map_err(cannot);
    }
    let put = || -> io::Result<()> {
        // made for nobody else; what is in it is for whoever may read the rest
        fs::set_permissions(&aside.0, fs::metadata(parent)?.permissions())?;
        if is_there {
            // what was there is gone when the new is in its place, and not before
            fs::rename(to, beside("old"))?;
        }
        fs::rename(&aside.0, to)?;
        if is_there { fs::remove_dir_all(beside("old")) } else { Ok(()) }
    };
    put().map_err(cannot)?;
    owned.add(to);
    Ok(())
}

/// Puts files into a folder that has others.
fn merge(from: &Path, to: &Path) -> io::Result<()> {
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        let there = fs::symlink_metadata(&target);
        if !entry.file_type()?.is_dir() {
            // a file takes the place of a file or a link, and of nothing else
            fs::rename(entry.path(), &target)?;
        } else if there.is_ok_and(|there| there.is_dir()) {
            merge(&entry.path(), &target)?;
        } else {
            fs::rename(entry.path(), &target)?;
        }
    }
    Ok(())
}

fn copy_out(from: &Path, to: &Path, masks: &Masks) -> Result<(), Uncollected> {
    let cannot = |error: io::Error| Uncollected::Cannot(format!("could not keep `{}`: {error}", from.display()));
    for entry in fs::read_dir(from).map_err(cannot)? {
        let entry = entry.map_err(cannot)?;
        let (path, target) = (entry.path(), to.join(entry.file_name()));
        if entry.file_type().map_err(cannot)?.is_dir() {
            fs::create_dir(&target).map_err(cannot)?;
            copy_out(&path, &target, masks)?;
            continue;
        }
        let mut tail = vec![];
        let mut has_secret = false;
        copy(&path, &target, OFlags::NOFOLLOW, &mut |piece| {
            if !masks.is_empty() && !has_secret {
                tail.extend_from_slice(piece);
                has_secret = masks.find(&tail);
                tail.drain(..tail.len().saturating_sub(masks.longest()));
            }
        })
        .map_err(cannot)?;
        if has_secret {
            return Err(Uncollected::Refused(format!("a secret is in `{}`", entry.file_name().display())));
        }
    }
    Ok(())
}

fn no_input(path: &Path, error: &io::Error) -> String {
    format!("could not read the input `{}`: {error}", path.display())
}

/// Copies a regular file, and answers whether it was the same before and after.
fn copy(from: &Path, to: &Path, flags: OFlags, see: &mut dyn FnMut(&[u8])) -> io::Result<bool> {
    // opening a pipe that nobody writes to would wait for ever
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | flags;
    let mut source = File::from(rustix::fs::open(from, flags, Mode::empty())?);
    let stamp = |file: &File| file.metadata().map(|it| (it.len(), it.mtime(), it.mtime_nsec(), it.is_file()));
    let before = stamp(&source)?;
    if !before.3 {
        return Err(io::Error::other("it is a special file"));
    }
    let mut target = File::create(to)?;
    let mut piece = vec![0; PIECE.min(usize::try_from(before.0).unwrap_or(PIECE) + 1)];
    loop {
        match source.read(&mut piece)? {
            0 => break,
            read => {
                see(&piece[..read]);
                target.write_all(&piece[..read])?;
            }
        }
    }
    Ok(stamp(&source)? == before)
}

/// Copies an input that is as it is, or changes once.
fn copy_input(from: &Path, to: &Path, flags: OFlags) -> Result<(), String> {
    for _ in 0..2 {
        if copy(from, to, flags, &mut |_| {}).map_err(|error| no_input(from, &error))? {
            return Ok(());
        }
    }
    Err(format!("the input `{}` changes while it is copied", from.display()))
}

/// Sees that an input can be copied, without doing it.
///
/// # Errors
/// Names what cannot be.
pub(super) fn check_input(root: &Path) -> Result<(), String> {
    let metadata = fs::metadata(root).map_err(|error| no_input(root, &error))?;
    if !metadata.is_dir() {
        let special = || format!("the input `{}` is a special file", root.display());
        return if metadata.is_file() { Ok(()) } else { Err(special()) };
    }
    walk(root, &mut |path, kind, _| {
        if kind == Kind::File {
            let special = || format!("the input `{}` is a special file", path.display());
            let metadata = fs::metadata(path).map_err(|error| no_input(path, &error))?;
            return if metadata.is_file() { Ok(()) } else { Err(special()) };
        }
        Ok(())
    })
}

fn copy_tree(root: &Path, to: &Path) -> Result<(), String> {
    walk(root, &mut |path, kind, rest| {
        let target = to.join(rest);
        let done = match kind {
            Kind::File => return copy_input(path, &target, OFlags::NOFOLLOW),
            Kind::Folder => fs::create_dir(&target),
            Kind::Link => fs::read_link(path).and_then(|link| std::os::unix::fs::symlink(link, &target)),
        };
        done.map_err(|error| no_input(path, &error))
    })
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    File,
    Folder,
    Link,
}

/// Goes through a tree in the order of its names; a link in it must lead to somewhere in it.
fn walk(root: &Path, visit: &mut dyn FnMut(&Path, Kind, &Path) -> Result<(), String>) -> Result<(), String> {
    let real = fs::canonicalize(root).map_err(|error| no_input(root, &error))?;
    let mut open = vec![(root.to_owned(), PathBuf::new())];
    while let Some((folder, rest)) = open.pop() {
        if rest.components().count() > DEPTH_MAX {
            return Err(format!("the input `{}` is nested deeper than {DEPTH_MAX}", root.display()));
        }
        let entries = fs::read_dir(&folder).and_then(Iterator::collect::<io::Result<Vec<_>>>);
        let mut entries = entries.map_err(|error| no_input(&folder, &error))?;
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            let (path, rest) = (entry.path(), rest.join(entry.file_name()));
            let kind = entry.file_type().map_err(|error| no_input(&path, &error))?;
            if kind.is_symlink() {
                let target = fs::canonicalize(&path).map_err(|error| no_input(&path, &error))?;
                let is_absolute = fs::read_link(&path).is_ok_and(|link| link.is_absolute());
                if is_absolute || !target.starts_with(&real) {
                    return Err(format!("the input `{}` is a link out of `{}`", path.display(), root.display()));
                }
                visit(&path, Kind::Link, &rest)?;
            } else if kind.is_dir() {
                visit(&path, Kind::Folder, &rest)?;
                open.push((path, rest));
            } else {
                visit(&path, Kind::File, &rest)?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_changes_while_it_is_copied_is_noticed() {
        let folder = tempfile::tempdir().expect("a folder");
        let (from, to) = (folder.path().join("from"), folder.path().join("to"));
        fs::write(&from, "x".repeat(PIECE + 1)).expect("a file");
        assert!(copy(&from, &to, OFlags::empty(), &mut |_| {}).expect("a copy"));
        let grow =
            || File::options().append(true).open(&from).and_then(|mut file| file.write_all(b"y")).expect("it grows");
        // not with each piece, or it would have no end
        assert!(
            !copy(&from, &to, OFlags::empty(), &mut |piece| if piece.len() > 1 {
                grow();
            })
            .expect("a copy")
        );
        let special = copy(Path::new("/dev/null"), &to, OFlags::empty(), &mut |_| {});
        assert_eq!(special.expect_err("no file").to_string(), "it is a special file");
    }
}
