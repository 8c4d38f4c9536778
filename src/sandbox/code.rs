//! Compiled code: how it is made, how it is packed, and how it is known to be whole.
//!
//! A packed file is what the engine made, followed by what the guest is and a check of both:
//!
//! | bytes | what |
//! | --- | --- |
//! | any | machine code, an ELF image that the engine maps; it ignores what follows |
//! | n | the guest's [`Inspection`] as JSON |
//! | 4 | n, little-endian |
//! | 32 | SHA-256 of everything before |
//! | 8 | `wrun.3\r\n` |
//!
//! The check finds damage, not malice: whoever can write the file can make the check fit. So packed code is only taken
//! from where nobody else may write (the cache), from our own hands, or when the user vouches for it.

use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    path::PathBuf,
};

use sha2::{Digest, Sha256};
use wasmtime::{Engine, Module, component::Component, error::OutOfMemory};

use crate::{
    limits::CompileLimits,
    sandbox::{
        Form, Inspection, LoadError,
        engine::Engines,
        guest, precheck,
        threads::{OWN_IMPORTS, check_contract, rewrite},
    },
};

/// Ends every packed file, and is part of its name in the cache: another number for another form of what is packed.
pub(crate) const MAGIC: &[u8; 8] = b"wrun.3\r\n";
const TRAILER: usize = 4 + 32 + 8;

/// Compiled code in a file that is whole.
#[derive(Debug)]
pub(crate) struct Code {
    file: File,
    /// What the guest is.
    pub(crate) inspection: Inspection,
}

/// Compiled code that this process has just made, packed.
pub(crate) struct Packed {
    /// What its file holds.
    bytes: Vec<u8>,
    /// What it was compiled for.
    pub(super) engine: Engine,
    /// What the guest is.
    pub(crate) inspection: Inspection,
}

/// Compiles a guest (binary or text) within the limits, for the engine that it needs, and packs the result.
///
/// # Errors
/// When it is no guest, not valid, or beyond a limit.
pub(crate) fn compile(engines: &Engines, bytes: Vec<u8>, limits: &CompileLimits) -> Result<Packed, LoadError> {
    let mut wasm = guest::binary(bytes)?;
    let inspection = Inspection::of(&wasm)?;
    precheck(&wasm, limits)?;
    let invalid = |reason: String| LoadError::Invalid { reason };
    if inspection.has_threads() {
        if inspection.imports.iter().chain(&inspection.exports).any(|name| name.starts_with("wrun:guest/")) {
            check_contract(&wasm)?;
        }
        // what the rewriting adds is not a guest's to call
        if let Some(import) = inspection.imports.iter().find(|import| import.starts_with(OWN_IMPORTS)) {
            return Err(LoadError::UnknownImport { import: import.clone() });
        }
        wasm = rewrite(&wasm, engines.spec.epoch_checks)?;
    }
    let engine = engines.of(&inspection).map_err(|error| invalid(guest::one_line(&format!("{error:#}"))))?;
    let compiled = match inspection.form {
        Form::Component => engine.precompile_component(&wasm),
        Form::Module => engine.precompile_module(&wasm),
    };
    let mut packed = compiled.map_err(|error| match error.downcast_ref::<OutOfMemory>() {
        Some(_) => LoadError::CompileMemory { limit: limits.memory },
        None => invalid(guest::one_line(&format!("{error:#}"))),
    })?;
    let meta = serde_json::to_vec(&inspection).expect("plain data has a JSON form");
    packed.extend_from_slice(&meta);
    packed.extend_from_slice(&u32::try_from(meta.len()).expect("bounded by the guest's size").to_le_bytes());
    packed.extend_from_slice(&Sha256::digest(&packed));
    packed.extend_from_slice(MAGIC);
    Ok(Packed { bytes: packed, engine, inspection })
}

impl Packed {
    /// What its file holds.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Maps a component, copied.
    pub(super) fn component(&self) -> wasmtime::Result<Component> {
        // SAFETY: these bytes are what `compile`, the only maker of this type, got from the engine.
        unsafe { Component::deserialize(&self.engine, &self.bytes) }
    }

    /// Maps a core module, copied.
    pub(super) fn module(&self) -> wasmtime::Result<Module> {
        // SAFETY: as in `component`.
        unsafe { Module::deserialize(&self.engine, &self.bytes) }
    }
}

impl Code {
    /// Takes a packed file after reading all of it once against its check; none when it is damaged or something else.
    pub(crate) fn open(mut file: File) -> Option<Self> {
        let mut bytes = Vec::new();
        file.seek(SeekFrom::Start(0)).ok()?;
        file.read_to_end(&mut bytes).ok()?;
        let inspection = unpack(&bytes)?;
        Some(Self { file, inspection })
    }

    /// Takes a file that the parent process has checked already, and what it said of it.
    pub(crate) fn checked(file: File, inspection: Inspection) -> Self {
        Self { file, inspection }
    }

    /// The size of its file, in bytes.
    pub(crate) fn size(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    /// A path under which the engine can map the very file that was checked, whatever its name is now.
    fn path(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.file.as_raw_fd()).into()
    }

    /// Maps a component.
    pub(crate) fn component(&self, engine: &Engine) -> wasmtime::Result<Component> {
        // SAFETY: the file holds what `compile` made: `open` has checked it, and `Cache`, the parent process or the
        // user (`--precompiled`) keep others from writing to it. The engine itself refuses code made for another
        // version, other flags or another processor.
        unsafe { Component::deserialize_file(engine, self.path()) }
    }

    /// Maps a core module.
    pub(crate) fn module(&self, engine: &Engine) -> wasmtime::Result<Module> {
        // SAFETY: as in `component`.
        unsafe { Module::deserialize_file(engine, self.path()) }
    }
}

impl AsFd for Code {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn unpack(bytes: &[u8]) -> Option<Inspection> {
    let (body, trailer) = bytes.split_at_checked(bytes.len().checked_sub(TRAILER)?)?;
    let (meta_length, rest) = trailer.split_first_chunk::<4>()?;
    let (digest, magic) = rest.split_first_chunk::<32>()?;
    if magic != MAGIC || Sha256::new().chain_update(body).chain_update(meta_length).finalize()[..] != digest[..] {
        return None;
    }
    let meta_length = usize::try_from(u32::from_le_bytes(*meta_length)).ok()?;
    serde_json::from_slice(&body[body.len().checked_sub(meta_length)?..]).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{limits::Bytes, sandbox::EngineSpec};

    #[test]
    fn any_damage_is_seen() {
        let spec = EngineSpec { epoch_checks: false, fuel: false, stack: Bytes::kib(512), pool: None };
        let wat = b"(module (func (export \"_start\")))".to_vec();
        let packed = compile(&spec.engines().expect("an engine"), wat, &CompileLimits::default()).expect("valid").bytes;
        assert_eq!(unpack(&packed).expect("whole").exports, ["_start"]);
        for at in (0..packed.len()).step_by(7).chain(packed.len() - TRAILER..packed.len()) {
            let mut damaged = packed.clone();
            damaged[at] ^= 1;
            assert_eq!(unpack(&damaged), None, "byte {at}");
        }
        for length in [0, 1, TRAILER - 1, TRAILER, packed.len() / 2, packed.len() - 1] {
            assert_eq!(unpack(&packed[..length]), None, "cut to {length}");
        }
    }
}
