//! The sandbox: load a guest once, start it many times, run it to an [`Outcome`].
//!
//! The only part that knows the engine: no type of wasmtime leaves this folder. It owns what a guest can reach (the
//! host side of `wit/` and WASI, by its grants) and what bounds it from inside (memory, stack, fuel, tables, host
//! calls). It does not watch the clock and knows no processes: who waits for a guest does.
//!
//! [`guest::Guest`] (bytes) → [`cache::Cache`] / [`code::compile`] → [`code::Code`] (mapped) → [`Sandbox`] (linked) →
//! [`instance::Instance`] (started).

mod cache;
mod code;
mod cores;
mod engine;
mod guest;
mod host;
mod inspect;
mod instance;
mod instances;
mod map;
mod precheck;
mod stdio;
mod threads;
mod window;

use std::{io, path::PathBuf, sync::Arc, time::Duration};

use wasmtime::{Engine, ResourcesRequired, component, component::Linker};

use self::engine::{CORE_INSTANCES_MAX, MEMORIES_MAX, TABLE_ELEMENTS_MAX, TABLES_MAX};
pub(crate) use self::{
    cache::write_whole,
    code::{Code, Packed, compile},
    engine::{ENGINE, EngineSpec, Pool},
    guest::{binary, name_of, open_file},
    host::{
        BodyError, Full, GuestBody, Identity, Mailbox, Network, Received, Respond, Roots, SOCKETS_MAX, Scheme,
        Unfinished,
    },
    inspect::{import_hint, offered},
    instance::{Answer, Cwd, Instance, Setup, cpu_ms},
    map::Work,
    precheck::precheck,
    stdio::{OutputSink, Stdio},
    threads::{Answers, Group, GroupSetup, NotTaken, Task},
    window::{Buffers, Source as BufferSource},
};
pub use self::{
    cache::{Cache, Source},
    guest::Guest,
    inspect::{Form, Inspection, Shape},
    threads::{OutOfBounds, SharedMemory, To},
};
use crate::{
    grant::GrantError,
    limits::Bytes,
    outcome::{End, Outcome, Stage},
};

/// Why a guest was not taken.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// There is no such file.
    #[error("no such guest: `{path}`", path = .path.display())]
    NotFound {
        /// Where it was looked for.
        path: PathBuf,
    },
    /// It could not be read, or its code could not be written.
    #[error("could not read `{path}`: {source}", path = .path.display())]
    Unreadable {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The path is not a file's.
    #[error("expected a file, but `{path}` is {found}", path = .path.display())]
    NotAFile {
        /// Which path.
        path: PathBuf,
        /// What is there instead.
        found: &'static str,
    },
    /// The file is too large.
    #[error("`{path}` is larger than the {max} that a guest may have", path = .path.display())]
    TooLarge {
        /// Which file.
        path: PathBuf,
        /// The limit.
        max: Bytes,
    },
    /// The file is no WebAssembly.
    #[error("expected WebAssembly (a binary or WAT text), found {found}")]
    NotWasm {
        /// What it looks like.
        found: &'static str,
    },
    /// The file is WebAssembly, but not valid.
    #[error("not a valid guest: {reason}")]
    Invalid {
        /// What is wrong, and at which offset.
        reason: String,
    },
    /// It has more of something than is compiled without being asked to.
    #[error("{whose} has {found} {what}, more than the {max} that are compiled (--compile-{flag})")]
    TooComplex {
        /// The guest, or one of its functions.
        whose: String,
        /// Of what.
        what: &'static str,
        /// How many it has.
        found: u64,
        /// How many it may have.
        max: u64,
        /// The flag that sets this limit, without `--compile-`.
        flag: &'static str,
    },
    /// Compiling it took more memory than it may.
    #[error("it took more than {limit} of memory to compile (--compile-memory)")]
    CompileMemory {
        /// The limit.
        limit: Bytes,
    },
    /// Compiling it took longer than it may.
    #[error("it took more than {limit:?} to compile (--compile-time)")]
    CompileTime {
        /// The limit.
        limit: Duration,
    },
    /// It imports what wrun does not offer.
    #[error("it imports `{import}`, which wrun does not offer")]
    UnknownImport {
        /// The import's name.
        import: String,
    },
    /// It imports something under a known name but of another type.
    #[error("its imports do not fit: {reason}")]
    Mismatch {
        /// What was expected and found.
        reason: String,
    },
    /// It is not the shape of guest that was asked for.
    #[error("expected {expected}, found {found}", expected = with_article(*.expected), found = found_shape(*.found, *.form))]
    WrongShape {
        /// What was asked for.
        expected: Shape,
        /// What it is.
        found: Option<Shape>,
        /// How it is packed.
        form: Form,
    },
    /// Precompiled code is damaged, or was made for another version, other flags or another processor.
    #[error("precompiled code does not fit: {reason}")]
    Precompiled {
        /// Why.
        reason: String,
    },
    /// It cannot start within the memory limit.
    #[error("it starts with {needs} of memory, more than the {limit} that it may have (--memory)")]
    NeedsMemory {
        /// What it starts with.
        needs: Bytes,
        /// The limit.
        limit: Bytes,
    },
    /// It consists of more than one guest may have.
    #[error("it has more {what} than the {max} that a guest may have")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many it may have.
        max: u64,
    },
    /// It is to have threads, but shares no memory.
    #[error("it imports no shared memory, in which its threads could work")]
    NoThreads {
        /// How it is packed.
        form: Form,
    },
    /// Another process says so.
    #[error("{reason}")]
    Reported {
        /// In which step.
        stage: Stage,
        /// Why, in words.
        reason: String,
        /// What to do next.
        hint: Option<String>,
    },
    /// What was granted is not there.
    #[error(transparent)]
    Grant(#[from] GrantError),
}

/// How a hint begins that a limit can be raised.
const FEW_PROGRAMS: &str = "few programs are like that; if this one shall be compiled";

fn with_article(shape: Shape) -> String {
    format!("{} {shape} guest", if shape == Shape::Http { "an" } else { "a" })
}

fn found_shape(found: Option<Shape>, form: Form) -> String {
    match found {
        Some(shape) => format!("{} ({form})", with_article(shape)),
        None => format!("a {form} that exports nothing wrun can run"),
    }
}

impl LoadError {
    fn bad_start() -> Self {
        Self::Invalid { reason: "`_start` must be a function without parameters and results".into() }
    }

    const TOO_MANY_INSTANCES: Self = Self::TooMany { what: "core instances", max: CORE_INSTANCES_MAX as u64 };

    /// What to do next, when there is something.
    #[must_use]
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::UnknownImport { import } => inspect::import_hint(import).into(),
            Self::WrongShape { found: Some(found), form, .. } => match found.modes(*form, *found == Shape::Handler) {
                [] => format!("no mode of wrun runs {} ({form}) yet", with_article(*found)),
                // what it is likely to be for
                [mode, ..] => format!("use `wrun {mode}`"),
            },
            Self::WrongShape { expected: Shape::Handler, found: None, .. } => {
                "a handler exports `wrun:guest/handler@0.1.0`, see wit/handler.wit".into()
            }
            Self::WrongShape { expected: Shape::Http, found: None, .. } => {
                "a port is served by what exports `wasi:http/incoming-handler@0.2` or `wrun:guest/handler@0.1.0`".into()
            }
            Self::WrongShape { found: None, .. } => {
                "a command is a program with a `main`, built for wasm32-wasip1 or wasm32-wasip2".into()
            }
            Self::Precompiled { .. } => {
                "make it again with `wrun compile -o`, by this wrun, with `--fuel` if it runs with that, and without `--epoch`".into()
            }
            Self::NoThreads { form: Form::Component } => {
                "a handler that is a component works on the chunks of a file, each thread in an instance of its own: `--input FILE`".into()
            }
            Self::NoThreads { .. } => {
                "build it with `--target wasm32-wasip1-threads`, or for C with `-pthread -Wl,--import-memory,--export-memory,--max-memory=…`".into()
            }
            Self::NeedsMemory { needs, .. } => format!("give it more: `--memory {needs}` or above"),
            Self::TooComplex { found, flag, .. } => {
                format!("{FEW_PROGRAMS}: `--compile-{flag} {found}`")
            }
            Self::CompileMemory { .. } => FEW_PROGRAMS.to_owned() + ", raise `--compile-memory`",
            Self::CompileTime { .. } => FEW_PROGRAMS.to_owned() + ", raise `--compile-time`",
            Self::Reported { hint, .. } => return hint.clone(),
            _ => return None,
        })
    }

    /// The outcome of a run that ended here.
    pub(crate) fn end(&self) -> End {
        let stage = match self {
            Self::NotFound { .. } | Self::Unreadable { .. } | Self::NotAFile { .. } | Self::TooLarge { .. } => {
                Stage::Load
            }
            Self::NotWasm { .. }
            | Self::Invalid { .. }
            | Self::TooComplex { .. }
            | Self::CompileMemory { .. }
            | Self::CompileTime { .. }
            | Self::Precompiled { .. } => Stage::Compile,
            Self::UnknownImport { .. }
            | Self::Mismatch { .. }
            | Self::WrongShape { .. }
            | Self::TooMany { .. }
            | Self::NoThreads { .. } => Stage::Link,
            Self::Grant(_) | Self::NeedsMemory { .. } => Stage::Start,
            Self::Reported { stage, .. } => *stage,
        };
        // names that it quotes are a guest's
        End::Failed { stage, reason: guest::one_line(&self.to_string()), hint: self.hint() }
    }
}

/// A guest's code, mapped: from here on no file is opened and no memory is made executable.
pub(crate) struct Mapped {
    engine: Engine,
    code: MappedCode,
}

enum MappedCode {
    Component(component::Component),
    Module(wasmtime::Module),
}

impl Mapped {
    /// Maps code from its file.
    ///
    /// # Errors
    /// When it does not fit the engine.
    pub(crate) fn of(engine: Engine, code: &Code) -> Result<Self, LoadError> {
        let mapped = match code.inspection.form {
            Form::Component => code.component(&engine).map(MappedCode::Component),
            Form::Module => code.module(&engine).map(MappedCode::Module),
        };
        Self::from(engine, mapped)
    }

    fn from(engine: Engine, code: wasmtime::Result<MappedCode>) -> Result<Self, LoadError> {
        // not the whole chain: it names the file by the descriptor that it is mapped from
        let code = code.map_err(|error| {
            if instance::has_too_many_instances(&error) {
                LoadError::TOO_MANY_INSTANCES
            } else {
                LoadError::Precompiled { reason: guest::one_line(&error.root_cause().to_string()) }
            }
        })?;
        Ok(Self { engine, code })
    }

    /// Links it, as a guest of the expected shape.
    ///
    /// # Errors
    /// When it is of another shape, consists of too much, or imports what is not offered.
    pub(crate) fn link(self, inspection: &Inspection, expected: Shape) -> Result<Sandbox, LoadError> {
        let Inspection { form, shape: found, .. } = *inspection;
        let wrong_shape = || LoadError::WrongShape { expected, found, form };
        if found != Some(expected) {
            return Err(wrong_shape());
        }
        self.is_within_caps()?;
        let engine = self.engine;
        let program = match (expected, self.code) {
            (_, MappedCode::Component(component)) => {
                let mut linker = Linker::new(&engine);
                instance::link_component(&mut linker, &inspection.imports).expect("no name is linked twice");
                let pre = linker.instantiate_pre(&component).map_err(|error| link_error(&error, &component))?;
                let program = match expected {
                    Shape::Handler => host::bindings::HandlerGuestPre::new(pre).map(Program::Handler),
                    Shape::Http => wasmtime_wasi_http::p2::bindings::ProxyPre::new(pre).map(Program::Http),
                    Shape::Command => wasmtime_wasi::p2::bindings::CommandPre::new(pre).map(Program::Command),
                };
                program.map_err(|error| mismatch(&error))?
            }
            (Shape::Command, MappedCode::Module(module)) => {
                let mut linker = wasmtime::Linker::new(&engine);
                instance::link_module(&mut linker).expect("no name is linked twice");
                if !instance::is_start(module.get_export("_start")) {
                    return Err(LoadError::bad_start());
                }
                Program::Module(linker.instantiate_pre(&module).map_err(module_link_error)?)
            }
            (Shape::Handler | Shape::Http, MappedCode::Module(_)) => return Err(wrong_shape()),
        };
        Ok(Sandbox { engine, program })
    }

    /// Links it, as a guest with threads of the expected shape, with a memory that grows to this much and no further.
    ///
    /// # Errors
    /// As [`Mapped::link`].
    pub(crate) fn link_group(
        self,
        inspection: &Inspection,
        expected: Shape,
        memory: Bytes,
    ) -> Result<threads::Program, LoadError> {
        let Inspection { form, shape: found, .. } = *inspection;
        self.is_within_caps()?;
        match self.code {
            MappedCode::Module(module) if found == Some(expected) && expected != Shape::Http => {
                threads::link(&self.engine, &module, expected, memory)
            }
            _ => Err(LoadError::WrongShape { expected, found, form }),
        }
    }

    /// The engine looks at the same when an instance is made. Here the guest is refused before it is kept, and in words
    /// that do not depend on how instances are made.
    fn is_within_caps(&self) -> Result<(), LoadError> {
        let Some(required) = self.code.required() else { return Ok(()) };
        for (what, found, max) in [
            ("linear memories", required.num_memories.into(), MEMORIES_MAX.into()),
            ("tables", required.num_tables.into(), TABLES_MAX.into()),
            ("elements in a table", required.max_initial_table_size.unwrap_or(0), TABLE_ELEMENTS_MAX as u64),
        ] {
            if found > max {
                return Err(LoadError::TooMany { what, max });
            }
        }
        Ok(())
    }
}

impl MappedCode {
    /// What its instances need; none when it imports modules, which are not offered.
    fn required(&self) -> Option<ResourcesRequired> {
        match self {
            Self::Component(component) => component.resources_required(),
            Self::Module(module) => Some(module.resources_required()),
        }
    }
}

/// A guest that is mapped and linked, ready to be started any number of times.
pub(crate) struct Sandbox {
    engine: Engine,
    program: Program,
}

/// A linked guest, by how it is driven.
enum Program {
    Handler(host::bindings::HandlerGuestPre<instance::State>),
    Http(wasmtime_wasi_http::p2::bindings::ProxyPre<instance::State>),
    Command(wasmtime_wasi::p2::bindings::CommandPre<instance::State>),
    Module(wasmtime::InstancePre<instance::State>),
}

impl Program {
    fn form(&self) -> Form {
        match self {
            Self::Handler(_) | Self::Http(_) | Self::Command(_) => Form::Component,
            Self::Module(_) => Form::Module,
        }
    }
}

/// Moves an engine's clock, on which guests with epoch checks give way.
pub(crate) struct Ticker(Engine);

impl Ticker {
    /// One tick.
    pub(crate) fn tick(&self) {
        self.0.increment_epoch();
    }
}

impl Sandbox {
    /// Makes an instance.
    ///
    /// # Errors
    /// The outcome, when the guest trapped or hit a limit while it started, or something granted is not there.
    pub(crate) async fn start(&self, setup: &Arc<Setup>) -> Result<Instance, Outcome> {
        Instance::start(&self.engine, &self.program, setup).await
    }

    /// Runs a command from start to end.
    pub(crate) async fn run(&self, setup: &Arc<Setup>) -> Outcome {
        match self.start(setup).await {
            Ok(instance) => instance.run().await,
            Err(outcome) => outcome,
        }
    }

    /// The clock of this sandbox's engine.
    pub(crate) fn ticker(&self) -> Ticker {
        Ticker(self.engine.clone())
    }
}

/// Sees that what [`compile`] has just made can be linked, whatever its shape; one that wrun cannot run at all passes.
///
/// # Errors
/// As [`Mapped::link`].
pub(crate) fn check(packed: &Packed) -> Result<(), LoadError> {
    let Packed { engine, inspection, .. } = packed;
    let (form, threads) = (inspection.form, inspection.has_threads());
    match inspection.shape {
        Some(shape) if shape == Shape::Command || form == Form::Component || threads => {
            let mapped = match form {
                Form::Component => packed.component().map(MappedCode::Component),
                Form::Module => packed.module().map(MappedCode::Module),
            };
            let mapped = Mapped::from(engine.clone(), mapped)?;
            if threads {
                // how much it may have is not known here
                return mapped.link_group(inspection, shape, Bytes(u64::MAX)).map(drop);
            }
            mapped.link(inspection, shape).map(drop)
        }
        _ => Ok(()),
    }
}

fn mismatch(error: &wasmtime::Error) -> LoadError {
    LoadError::Mismatch { reason: guest::one_line(&format!("{error:#}")) }
}

fn module_link_error(error: wasmtime::Error) -> LoadError {
    match error.downcast::<wasmtime::UnknownImportError>() {
        Ok(unknown) => LoadError::UnknownImport { import: format!("{}::{}", unknown.module(), unknown.name()) },
        Err(error) => mismatch(&error),
    }
}

/// The linker's error for a component names the import in its text only: look which import it means.
fn link_error(error: &wasmtime::Error, component: &component::Component) -> LoadError {
    let text = format!("{error:#}");
    if text.contains("implementation was not found in the linker") {
        let engine = component.engine();
        let imports = component.component_type();
        for (name, _) in imports.imports(engine) {
            if text.contains(&format!("`{name}`")) {
                return LoadError::UnknownImport { import: name.into() };
            }
        }
    }
    mismatch(error)
}
