//! Reports of a run, made of its record and the logs beside it.

mod annotations;
mod html;
mod junit;
#[cfg(test)]
mod sample;
mod summary;
mod svg;

use std::{
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom, Write},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use rustix::{
    fs::{FlockOperation, Mode, OFlags},
    io::Errno,
};

pub use self::annotations::annotations;
use crate::mode::ci::record::RunRecord;

/// How much of a log is in a report, from its end.
const LOG_MAX: u64 = 64 << 10;

/// The longest line of a log that is shown.
const LINE_MAX: usize = 8 << 10;

/// The largest record of a run before that is read.
const RECORD_MAX: u64 = 256 << 20;

/// The reports that somebody wants.
#[derive(Debug, Clone, Default)]
pub struct Reports {
    /// XML of `JUnit`, as Maven's Surefire writes it.
    pub junit: Option<PathBuf>,
    /// A page.
    pub html: Option<PathBuf>,
    /// Markdown.
    pub summary: Option<PathBuf>,
    /// A file that the same is added to.
    pub step_summary: Option<PathBuf>,
}

impl Reports {
    /// Writes them, and the record itself. Answers what could not be written.
    pub(super) fn write(&self, run: &RunRecord, artifacts: &Path) -> Vec<String> {
        let output = |log: &str| tail(&artifacts.join(log), LOG_MAX);
        let mut problems = vec![];
        let mut done = |what: &str, path: &Path, written: io::Result<()>| {
            if let Err(error) = written {
                problems.push(format!("could not write {what} `{}`: {error}", path.display()));
            }
        };
        let record = artifacts.join("run.json");
        let text = serde_json::to_string_pretty(run).expect("plain data has a JSON form") + "\n";
        done("the record", &record, put(&record, &text));
        if let Some(path) = &self.junit {
            let text = junit::junit(run, &output).map_err(io::Error::other);
            done("the JUnit report", path, text.and_then(|text| put(path, &text)));
        }
        if let Some(path) = &self.html {
            done("the page", path, put(path, &html::html(run, &output)));
        }
        if let Some(path) = &self.summary {
            done("the summary", path, put(path, &summary::summary(run)));
        }
        if let Some(path) = &self.step_summary {
            let added = File::options().append(true).create(true).open(path);
            done("the summary", path, added.and_then(|mut file| file.write_all(summary::summary(run).as_bytes())));
        }
        problems
    }
}

impl RunRecord {
    /// The record of the last run with this folder of artifacts, if there is one that can be read.
    #[must_use]
    pub fn read(artifacts: &Path) -> Option<Self> {
        let file = File::open(artifacts.join("run.json")).ok()?;
        serde_json::from_reader::<_, Self>(io::BufReader::new(file.take(RECORD_MAX))).ok().filter(|run| run.v == 1)
    }
}

/// Takes a folder of artifacts for a run, as long as the answer is there. One that is made for that version control leaves
/// alone; from another one the logs of the run before are removed, and nothing else.
pub(super) fn take_folder(folder: &Path, last: Option<&RunRecord>) -> io::Result<OwnedFd> {
    let is_new = !folder.exists();
    fs::create_dir_all(folder)?;
    if is_new {
        fs::write(folder.join(".gitignore"), "*\n")?;
    }
    let taken = rustix::fs::open(folder, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    match rustix::fs::flock(&taken, FlockOperation::NonBlockingLockExclusive) {
        Err(Errno::WOULDBLOCK) => return Err(io::Error::other("another run has it")),
        locked => locked?,
    }
    let attempts = last.into_iter().flat_map(|last| &last.jobs).flat_map(|job| &job.attempts);
    for log in attempts.flat_map(|attempt| [&attempt.stdout.log, &attempt.stderr.log]).flatten() {
        // a record that somebody else wrote may name anything
        if Path::new(log).parent() == Some(Path::new("logs")) {
            let _ = fs::remove_file(folder.join(log));
        }
    }
    Ok(taken)
}

/// Writes a file as a whole or not at all. A link is not followed, unless it is one of the system's own.
fn put(path: &Path, text: &str) -> io::Result<()> {
    let is_system = path.starts_with("/dev") || path.starts_with("/proc");
    match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_symlink() && !is_system => return Err(io::Error::other("it is a link")),
        Ok(metadata) if metadata.is_dir() => return Err(io::ErrorKind::IsADirectory.into()),
        Ok(metadata) if is_system || !metadata.is_file() => {
            // a pipe that nobody reads would be waited for
            let fd = rustix::fs::open(path, OFlags::WRONLY | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty())?;
            rustix::io::ioctl_fionbio(&fd, false)?;
            return File::from(fd).write_all(text.as_bytes());
        }
        _ => {}
    }
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_string_lossy().into_owned();
    let aside = path.with_file_name(format!(".{name}.{}.tmp", std::process::id()));
    let written = fs::write(&aside, text).and_then(|()| fs::rename(&aside, path));
    if written.is_err() {
        let _ = fs::remove_file(&aside);
    }
    written
}

/// The last bytes of a log as a text of whole lines, without control characters; empty when there is none.
pub(super) fn tail(path: &Path, most: u64) -> String {
    let read = || -> io::Result<(bool, Vec<u8>)> {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        let start = length.saturating_sub(most);
        file.seek(SeekFrom::Start(start))?;
        let mut bytes = vec![];
        file.take(most).read_to_end(&mut bytes)?;
        Ok((start > 0, bytes))
    };
    let Ok((is_cut, bytes)) = read() else { return String::new() };
    let text = String::from_utf8_lossy(&bytes);
    let mut clean = String::with_capacity(text.len());
    if is_cut {
        clean.push_str("…\n");
    }
    let lines = text.split_inclusive('\n').skip(usize::from(is_cut && text.contains('\n')));
    for line in lines {
        let line = match line.char_indices().nth(LINE_MAX) {
            Some((end, _)) => &format!("{}…\n", &line[..end]),
            None => line,
        };
        clean.extend(line.chars().filter(|c| !c.is_control() || matches!(c, '\n' | '\t')));
    }
    clean
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_log_is_whole_lines_without_controls() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("log");
        fs::write(&path, b"one\ntwo\x1b[31m\x07\nthree\xff").expect("a file");
        assert_eq!(tail(&path, 1000), "one\ntwo[31m\nthree\u{fffd}");
        assert_eq!(tail(&path, 12), "…\nthree\u{fffd}");
        fs::write(&path, "x".repeat(LINE_MAX + 1)).expect("a file");
        assert_eq!(tail(&path, 1 << 20).chars().count(), LINE_MAX + 2);
        assert_eq!(tail(&folder.path().join("none"), 9), "");
    }

    #[test]
    fn a_report_is_written_whole_and_through_no_link() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = |name: &str| folder.path().join(name);
        put(&path("new"), "1").expect("a new file");
        put(&path("new"), "2").expect("the same file");
        std::os::unix::fs::symlink(path("new"), path("link")).expect("a link");
        for name in ["link", ".", "none/file"] {
            assert!(put(&path(name), "3").is_err(), "{name}");
        }
        assert_eq!(fs::read_to_string(path("new")).expect("a file"), "2");
        assert_eq!(fs::read_dir(folder.path()).expect("a folder").count(), 2);
        put(Path::new("/dev/null"), "4").expect("a device");
    }
}
