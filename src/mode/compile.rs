//! `wrun compile`: compiles a guest ahead of its first run.

use std::path::{Path, PathBuf};

use crate::{
    Error,
    child::{Compiler, entry},
    limits::{CompileLimits, Limits},
    process::{Isolation, Program, runtime},
    sandbox::{Cache, EngineSpec, Guest, Source, write_whole},
};

/// What to compile, and for what. It is compiled by a child, whatever the guest does to a compiler.
///
/// ```no_run
/// # fn main() -> Result<(), wrun::Error> {
/// wrun::init(); // the compiler is this program, started again
/// let (path, _) = wrun::Compile::new("hello.wasm").into_cache(&wrun::Cache::at(None))?;
/// # Ok(()) }
/// ```
#[derive(Debug)]
#[must_use = "nothing is compiled before it is said where to"]
pub struct Compile {
    guest: PathBuf,
    epoch_checks: bool,
    fuel: bool,
    compiler: Compiler,
}

impl Compile {
    /// Compiles the guest in a file, or on standard input (`-`), without checks and metering.
    pub fn new(guest: impl Into<PathBuf>) -> Self {
        let compiler =
            Compiler { program: Program::Own, isolation: Isolation::Process, limits: CompileLimits::default() };
        Self { guest: guest.into(), epoch_checks: false, fuel: false, compiler }
    }

    /// Whether it can be interrupted from inside its process (`--interrupt epoch`).
    pub fn epoch_checks(mut self, wanted: bool) -> Self {
        self.epoch_checks = wanted;
        self
    }

    /// Whether it meters its fuel (`--fuel`).
    pub fn fuel(mut self, wanted: bool) -> Self {
        self.fuel = wanted;
        self
    }

    /// What bounds the compilation.
    pub fn limits(mut self, limits: CompileLimits) -> Self {
        self.compiler.limits = limits;
        self
    }

    /// The program that the compiler is made of, when it is not this one: a `wrun` of the same version.
    pub fn program(mut self, path: impl Into<PathBuf>) -> Self {
        self.compiler.program = Program::At(path.into());
        self
    }

    fn spec(&self) -> EngineSpec {
        EngineSpec { epoch_checks: self.epoch_checks, fuel: self.fuel, stack: Limits::of_a_run().stack, pool: None }
    }

    /// Compiles into the cache, and says where the entry is and whether it was there already.
    ///
    /// # Errors
    /// When it is no valid guest, or the cache cannot be used.
    ///
    /// # Panics
    /// Inside of a tokio runtime: it blocks.
    pub fn into_cache(self, cache: &Cache) -> Result<(PathBuf, Source), Error> {
        let spec = self.spec();
        let guest = Guest::read(&self.guest)?;
        let entry = entry(cache, spec, &guest)?
            .ok_or_else(|| Error::Usage("there is no cache to compile into; give a file with `-o`".into()))?;
        let (_, source) = runtime()?.block_on(self.compiler.load(Some(&entry), spec, &guest))?;
        if entry.exists() {
            return Ok((entry, source));
        }
        Err(Error::Io { what: "write to the cache", source: std::io::ErrorKind::WriteZero.into() })
    }

    /// Compiles into a file of its own, for `wrun run --precompiled` on a machine like this one.
    ///
    /// # Errors
    /// When it is no valid guest, or the file cannot be written.
    ///
    /// # Panics
    /// Inside of a tokio runtime: it blocks.
    pub fn to_file(self, output: &Path) -> Result<(), Error> {
        let guest = Guest::read(&self.guest)?;
        let packed = runtime()?.block_on(self.compiler.compile(self.spec(), &guest))?;
        write_whole(output, &packed).map_err(Error::io("write the compiled guest"))?;
        Ok(())
    }
}
