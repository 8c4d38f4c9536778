//! `wrun compile`: compiles a guest ahead of its first run.

use std::path::{Path, PathBuf};

use crate::{
    Error,
    limits::{Bytes, Limits},
    sandbox::{Cache, EngineSpec, Guest, Source, compile as compile_code, write_whole},
};

/// What compiled code can do beside running.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CompileFlags {
    /// It can be interrupted from inside its process (`--interrupt epoch`).
    pub epoch_checks: bool,
    /// It meters its fuel (`--fuel`).
    pub fuel: bool,
}

impl CompileFlags {
    fn spec(self) -> EngineSpec {
        let stack: Bytes = Limits::of_a_run().stack;
        EngineSpec { epoch_checks: self.epoch_checks, fuel: self.fuel, stack, pool: None }
    }
}

/// Compiles a guest into the cache, and says where its entry is and whether it was there already.
///
/// # Errors
/// When it is no valid guest, or the cache cannot be used.
pub fn compile_into(cache: &Cache, guest: &Path, flags: CompileFlags) -> Result<(PathBuf, Source), Error> {
    let engine = flags.spec().engine().map_err(|error| Error::Usage(format!("{error:#}")))?;
    let guest = Guest::read(guest)?;
    let entry = cache
        .entry(&engine, &guest)
        .ok_or_else(|| Error::Usage("there is no cache to compile into; give a file with `-o`".into()))?;
    let (_, source) = cache.load(&engine, guest)?;
    if entry.exists() {
        return Ok((entry, source));
    }
    Err(Error::Io { what: "write to the cache", source: std::io::ErrorKind::WriteZero.into() })
}

/// Compiles a guest into a file of its own, for `wrun run --precompiled` on a machine like this one.
///
/// # Errors
/// When it is no valid guest, or the file cannot be written.
pub fn compile_to(guest: &Path, output: &Path, flags: CompileFlags) -> Result<(), Error> {
    let engine = flags.spec().engine().map_err(|error| Error::Usage(format!("{error:#}")))?;
    let packed = compile_code(&engine, Guest::read(guest)?.bytes)?;
    write_whole(output, &packed).map_err(Error::io("write the compiled guest"))?;
    Ok(())
}
