//! What a guest prints, on its way to a log: masked, counted, bounded.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
};

use sha2::{Digest, Sha256};

use super::{
    mask::{Masker, Masks},
    record::StreamRecord,
};
use crate::limits::Bytes;

/// One stream of a guest.
#[derive(Debug)]
pub(super) struct Capture {
    masker: Masker,
    max: u64,
    /// How much came, before it was masked.
    came: u64,
    record: StreamRecord,
    digest: Sha256,
    ends_in_line: bool,
    path: PathBuf,
    log: Option<File>,
    problem: Option<io::Error>,
}

impl Capture {
    /// One that goes to `folder/name`, if anything comes.
    pub(super) fn new(masks: &Masks, max: Bytes, folder: &Path, name: &str) -> Self {
        Self {
            masker: Masker::new(masks.clone()),
            max: max.0,
            came: 0,
            record: StreamRecord { log: Some(name.into()), ..StreamRecord::default() },
            digest: Sha256::new(),
            ends_in_line: true,
            path: folder.join(name),
            log: None,
            problem: None,
        }
    }

    /// Takes more; whether that is too much.
    pub(super) fn take(&mut self, bytes: &[u8]) -> bool {
        let room = usize::try_from(self.max - self.came).unwrap_or(usize::MAX);
        let taken = &bytes[..bytes.len().min(room)];
        self.came += taken.len() as u64;
        let mut certain = vec![];
        self.masker.take(taken, &mut certain);
        self.write(&certain);
        taken.len() < bytes.len()
    }

    fn write(&mut self, bytes: &[u8]) {
        let Some(last) = bytes.last() else { return };
        self.record.bytes += bytes.len() as u64;
        self.record.lines += memchr::memchr_iter(b'\n', bytes).count() as u64;
        self.ends_in_line = *last == b'\n';
        self.digest.update(bytes);
        let written = match &mut self.log {
            Some(log) => log.write_all(bytes),
            None => fs::create_dir_all(self.path.parent().unwrap_or(Path::new(".")))
                .and_then(|()| File::create(&self.path))
                .and_then(|mut log| log.write_all(bytes).map(|()| self.log = Some(log))),
        };
        if let Err(error) = written {
            self.problem.get_or_insert(error);
        }
    }

    /// All that came, and why it could not be kept if so.
    pub(super) fn finish(mut self) -> (StreamRecord, Option<String>) {
        let mut rest = vec![];
        self.masker.finish(&mut rest);
        self.write(&rest);
        let mut record = self.record;
        record.lines += u64::from(!self.ends_in_line);
        record.sha256 = hex(&self.digest.finalize());
        if record.bytes == 0 {
            record.log = None;
        }
        let problem = self.problem.map(|error| format!("could not write `{}`: {error}", self.path.display()));
        (record, problem)
    }
}

/// Bytes as hexadecimal digits.
pub(super) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// The name of a job in the name of a file.
pub(super) fn file_name(job: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_.,=".contains(c);
    let plain: String = job.chars().map(|c| if is_plain(c) { c } else { '_' }).take(100).collect();
    if plain == job {
        return plain;
    }
    // several names may come to the same
    let digest = Sha256::digest(job.as_bytes());
    format!("{}-{}", plain.trim_end_matches('_'), &hex(&digest)[..8])
}
