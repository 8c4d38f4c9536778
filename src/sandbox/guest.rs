//! A guest as it comes: the file, its name, its bytes. Nothing of it is believed yet.

use std::{
    fs::File,
    io::{self, Read},
    path::Path,
};

use rustix::{
    fs::{FileType, Mode, OFlags},
    io::Errno,
};
use sha2::{Digest, Sha256};

use crate::{limits::Bytes, sandbox::LoadError};

/// The largest file that is taken for a guest.
const GUEST_MAX: Bytes = Bytes::mib(256);

/// The bytes that start every WebAssembly binary.
const MAGIC: &[u8] = b"\0asm";

/// A guest that was read but not compiled.
#[derive(Debug)]
pub struct Guest {
    /// Its name: the file's without `.wasm`, `.wat` and the like.
    pub(crate) name: String,
    /// The file's bytes: a binary, or a text.
    pub(crate) bytes: Vec<u8>,
}

impl Guest {
    /// Reads a guest from a file, or from standard input when the path is `-`.
    ///
    /// # Errors
    /// When there is no such file, it is no regular file, or it is too large.
    pub fn read(path: &Path) -> Result<Self, LoadError> {
        if path != Path::new("-") {
            return Self::read_file(open_file(path)?, path);
        }
        Self::of(name_of(path), io::stdin().lock(), path)
    }

    /// Reads one from a file that is open, and is called so.
    ///
    /// # Errors
    /// When it cannot be read, or is too large.
    pub(crate) fn read_file(file: File, path: &Path) -> Result<Self, LoadError> {
        // the size is looked at before anything is read
        let metadata = file.metadata().map_err(|source| LoadError::Unreadable { path: path.into(), source })?;
        if metadata.len() > GUEST_MAX.0 {
            return Err(LoadError::TooLarge { path: path.into(), max: GUEST_MAX });
        }
        Self::of(name_of(path), file, path)
    }

    fn of(name: String, reader: impl Read, path: &Path) -> Result<Self, LoadError> {
        let mut bytes = Vec::new();
        let read = reader.take(GUEST_MAX.0 + 1).read_to_end(&mut bytes);
        read.map_err(|source| LoadError::Unreadable { path: path.into(), source })?;
        if bytes.len() as u64 > GUEST_MAX.0 {
            return Err(LoadError::TooLarge { path: path.into(), max: GUEST_MAX });
        }
        Ok(Self { name, bytes })
    }

    /// As [`Guest::digest`], of the guest and what goes with it.
    pub(crate) fn digest_with(&self, more: &[u8]) -> [u8; 32] {
        Sha256::new().chain_update(self.digest()).chain_update(more).finalize().into()
    }

    /// SHA-256 of the bytes as they came: the guest's version.
    pub(crate) fn digest(&self) -> [u8; 32] {
        Sha256::digest(&self.bytes).into()
    }
}

/// Opens a regular file, and never waits for one: opening a pipe that nobody writes to would, for ever.
///
/// # Errors
/// When there is no such file, or it is no regular one.
pub(crate) fn open_file(path: &Path) -> Result<File, LoadError> {
    let io_error = |error: Errno| match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => LoadError::NotFound { path: path.into() },
        _ => LoadError::Unreadable { path: path.into(), source: error.into() },
    };
    let fd =
        rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK, Mode::empty()).map_err(io_error)?;
    let found = match FileType::from_raw_mode(rustix::fs::fstat(&fd).map_err(io_error)?.st_mode) {
        FileType::RegularFile => return Ok(fd.into()),
        FileType::Directory => "a folder",
        FileType::Fifo => "a pipe (use `-` for standard input)",
        _ => "a special file",
    };
    Err(LoadError::NotAFile { path: path.into(), found })
}

/// The WebAssembly binary that `bytes` are, or that their text stands for.
///
/// # Errors
/// Names what was found when it is neither.
pub(crate) fn binary(bytes: Vec<u8>) -> Result<Vec<u8>, LoadError> {
    if bytes.starts_with(MAGIC) {
        return Ok(bytes);
    }
    let found = match &bytes[..] {
        [] => "an empty file",
        [0x7f, b'E', b'L', b'F', ..] => "a native program or precompiled code (--precompiled runs what you trust)",
        _ => match std::str::from_utf8(&bytes) {
            Ok(text) if text.trim_start().starts_with(['(', ';']) => {
                return wat::parse_str(text)
                    .map_err(|error| LoadError::Invalid { reason: one_line(&error.to_string()) });
            }
            Ok(_) => "a text that is not WAT",
            Err(_) => "other binary data",
        },
    };
    Err(LoadError::NotWasm { found })
}

/// The longest error text, in characters: it may quote the guest, which has lines and names of megabytes.
const TEXT_MAX: usize = 1000;

/// Error texts of several lines, as one that is not too long.
pub(crate) fn one_line(text: &str) -> String {
    let mut line = String::new();
    for part in text.split('\n').map(str::trim).filter(|part| !part.is_empty()) {
        if !line.is_empty() {
            line.push(' ');
        }
        line.push_str(part);
    }
    if let Some((end, _)) = line.char_indices().nth(TEXT_MAX) {
        line.truncate(end);
        line.push('…');
    }
    line
}

/// `guests/echo.threads.wasm` is called `echo`.
pub(crate) fn name_of(path: &Path) -> String {
    let file = path.file_name().unwrap_or_default().to_string_lossy();
    match file.split_once('.') {
        _ if file == "-" => "stdin".into(),
        Some((name, _)) if !name.is_empty() => name.into(),
        _ => file.into_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_without_endings() {
        for (path, name) in
            [("a/echo.wasm", "echo"), ("echo.p1.wasm", "echo"), ("x", "x"), (".wasm", ".wasm"), ("-", "stdin")]
        {
            assert_eq!(name_of(Path::new(path)), name);
        }
    }

    #[test]
    fn what_is_no_guest_is_named() {
        let found = |bytes: &[u8]| match binary(bytes.to_vec()) {
            Err(LoadError::NotWasm { found }) => found,
            other => panic!("{other:?}"),
        };
        assert_eq!(found(b""), "an empty file");
        assert_eq!(found(b"#!/bin/sh"), "a text that is not WAT");
        assert_eq!(found(b"\xff\xfe"), "other binary data");
        assert!(found(b"\x7fELF\x02").starts_with("a native program"));
    }

    #[test]
    fn error_texts_are_one_line_that_ends() {
        assert_eq!(one_line("a\n  b\n\nc "), "a b c");
        let just = "ä".repeat(TEXT_MAX);
        assert_eq!(one_line(&just), just);
        assert_eq!(one_line(&format!("{just}b")), format!("{just}…"));
    }

    #[test]
    fn text_becomes_a_binary() {
        assert!(binary(b"  (module)".to_vec()).expect("WAT").starts_with(MAGIC));
        assert!(binary(b";; a comment\n(component)".to_vec()).expect("WAT").starts_with(MAGIC));
        match binary(b"(module (func $f (call $g)))".to_vec()) {
            Err(LoadError::Invalid { reason }) => {
                assert!(reason.contains("$g") && !reason.contains('\n'), "{reason}");
            }
            other => panic!("{other:?}"),
        }
    }
}
