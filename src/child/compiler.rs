//! A child that compiles one guest, or says what it is: whatever the guest's bytes do to a compiler, they do it to a
//! process that has nothing else to lose. Both ends are here.

use std::{
    fs::File,
    io::{Read, Seek, SeekFrom, Write},
    num::NonZero,
    os::fd::AsFd,
    path::{Path, PathBuf},
    time::Instant,
};

use rustix::{fs::MemfdFlags, process::Signal};
use serde::{Deserialize, Serialize};

use super::{enter, exit_with_primary};
use crate::{
    Error,
    limits::{Bytes, CompileLimits},
    outcome::{End, Outcome, Stage, Usage},
    process::{
        Bounds, Isolation, Jail, Process, Program, Purpose, Role,
        child::{Out, Start, report_panics},
        wire::{Frame, Kind},
    },
    sandbox::{Cache, Code, EngineSpec, Guest, Inspection, LoadError, Shape, Source, binary, check, compile},
};

/// What a compiler is told.
#[derive(Debug, Serialize, Deserialize)]
struct CompilerConfig {
    /// For which engine; none = it says what the guest can be driven by, and no more.
    engine: Option<EngineSpec>,
    /// What bounds it.
    limits: CompileLimits,
    /// What its process may do.
    jail: Jail,
}

/// Descriptors that a compiler needs: none but the guest's file, that of the code, and what it was started with.
const DESCRIPTORS: u64 = 16;

/// The child: reads the guest from the first descriptor and writes its code to the second.
pub(super) fn main(start: Start) -> i32 {
    // lives as long as the process
    let out: &'static Out = Box::leak(Box::new(Out::new(start.socket)));
    report_panics(out);
    let result = serde_json::from_str::<CompilerConfig>(start.hello.config.get())
        .map_err(|error| LoadError::Invalid { reason: error.to_string() })
        .and_then(|config| {
            let mut fds = start.fds.into_iter().skip(1).map(File::from);
            let (Some(mut guest), Some(mut code)) = (fds.next(), fds.next()) else {
                return Err(LoadError::Invalid { reason: "the compiler got no files".into() });
            };
            let unreadable = |source| LoadError::Unreadable { path: "the guest's copy".into(), source };
            let (engines, cores) = enter(&config.jail, out, || {
                let engines = config.engine.map(EngineSpec::engines).transpose();
                let engines = engines.map_err(|error| LoadError::Invalid { reason: error.to_string() })?;
                // the system tells that in files
                Ok((engines, std::thread::available_parallelism().map_or(1, NonZero::get)))
            })?;
            exit_with_primary(out).map_err(unreadable)?;
            // now, as long as there is memory for their stacks: the engine panics when there is none
            rayon::ThreadPoolBuilder::new()
                .num_threads(cores)
                .build_global()
                .map_err(|_| LoadError::CompileMemory { limit: config.limits.memory })?;

            let mut bytes = Vec::new();
            // through `take`, which does not ask the system for the size
            let read = guest.seek(SeekFrom::Start(0)).and_then(|_| guest.take(u64::MAX).read_to_end(&mut bytes));
            read.map_err(unreadable)?;
            let Some(engines) = engines else {
                // no more of it is asked for, and its names could be longer than a frame
                return Ok(Inspection::of(&binary(bytes)?)?.shape);
            };
            let packed = compile(&engines, bytes, &config.limits)?;
            // linked before it is handed over: what is kept is a guest that runs
            check(&packed)?;
            code.write_all(packed.bytes()).map_err(unreadable)?;
            Ok(None)
        });
    match result {
        Ok(shape) => {
            out.push(Kind::Ready, 0, &serde_json::to_vec(&shape).expect("plain data has a JSON form"));
        }
        Err(error) => {
            let outcome = error.end().with(Usage::default());
            out.push(Kind::Ended, 0, &serde_json::to_vec(&outcome).expect("plain data has a JSON form"));
        }
    }
    out.finish();
    0
}

/// Has guests compiled by children: the primary's end.
#[derive(Debug, Clone)]
pub(crate) struct Compiler {
    /// The program that children are made of.
    pub(crate) program: Program,
    /// What is between guests and the host. Compilers are processes always, and give up without a wall if guests do.
    pub(crate) isolation: Isolation,
    /// What bounds them.
    pub(crate) limits: CompileLimits,
}

impl Compiler {
    /// What a guest can be driven by; none when wrun knows no way to run it.
    ///
    /// # Errors
    /// When it is no guest, or there is no room for the child.
    pub(crate) async fn shape(&self, guest: &Guest) -> Result<Option<Shape>, Error> {
        let (said, _) = self.run(None, guest).await?;
        serde_json::from_slice(&said)
            .map_err(|_| LoadError::Invalid { reason: "its compiler does not say what it is".into() }.into())
    }

    /// A guest's code: found at its entry, or compiled and kept there.
    ///
    /// # Errors
    /// When the guest is not valid or cannot be linked, or there is no room for the child or the code.
    pub(crate) async fn load(
        &self,
        entry: Option<&Path>,
        spec: EngineSpec,
        guest: &Guest,
    ) -> Result<(Code, Source), Error> {
        if let Some(code) = entry.and_then(Cache::find) {
            tracing::debug!("`{}` was compiled before", guest.name);
            return Ok((code, Source::Cache));
        }
        let packed = self.compile(spec, guest).await?;
        let code = Cache::keep(entry, &packed);
        Ok((code.map_err(Error::io("keep the compiled guest"))?, Source::Compiler))
    }

    /// A guest's code, compiled and packed.
    ///
    /// # Errors
    /// As [`Compiler::load`].
    pub(crate) async fn compile(&self, spec: EngineSpec, guest: &Guest) -> Result<Vec<u8>, Error> {
        let started = Instant::now();
        let (_, mut output) = self.run(Some(EngineSpec { pool: None, ..spec }), guest).await?;
        tracing::debug!("`{}` was compiled in {:?}", guest.name, started.elapsed());
        let mut packed = Vec::new();
        output
            .seek(SeekFrom::Start(0))
            .and_then(|_| output.read_to_end(&mut packed))
            .map_err(Error::io("read the compiled guest"))?;
        Ok(packed)
    }

    fn jail(&self) -> Jail {
        let CompileLimits { time, memory, .. } = self.limits;
        Jail {
            required: self.isolation == Isolation::Jail,
            dirs: vec![],
            ports: vec![],
            purpose: Purpose::Compiler,
            namespaces: self.isolation == Isolation::Jail,
            threads: 0,
            bounds: Bounds { cpu: Some(time), files: DESCRIPTORS, file_size: memory, data: memory },
            without: vec![],
        }
    }

    /// Runs a child on a guest: what it said when it was done, and the file that it wrote.
    async fn run(&self, engine: Option<EngineSpec>, guest: &Guest) -> Result<(Vec<u8>, File), Error> {
        let config = CompilerConfig { engine, limits: self.limits, jail: self.jail() };
        let file = |name: &str| rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC).map(File::from);
        let (mut input, output) = file("wrun-guest")
            .and_then(|input| Ok((input, file("wrun-code")?)))
            .map_err(|error| Error::Io { what: "make a file in memory", source: error.into() })?;
        input.write_all(&guest.bytes).map_err(Error::io("copy the guest"))?;

        let fds = [input.as_fd(), output.as_fd()];
        let body_max = u32::try_from(Bytes::mib(1).0).expect("small");
        let child = Process::start(&self.program, Role::Compiler, &config, &fds, body_max)
            .map_err(Error::io("start a compiler"))?;
        tracing::debug!("{} `{}`", if engine.is_some() { "compiling" } else { "inspecting" }, guest.name);
        let (mut ready, mut said, mut panicked) = (None, None, None);
        let take = |frame: Frame<'_>| match frame.kind {
            Kind::Ready => ready = Some(frame.body.to_vec()),
            Kind::Ended => said = serde_json::from_slice::<Outcome>(frame.body).ok(),
            Kind::Panic => panicked = Some(String::from_utf8_lossy(frame.body).into_owned()),
            Kind::Walls => tracing::debug!("compiling: {}", String::from_utf8_lossy(frame.body)),
            _ => {}
        };
        let (end, out_of_time) = child.finish(Some(self.limits.time), take).await;
        match (said.map(|outcome| outcome.end), ready) {
            (Some(End::Failed { stage, reason, hint }), _) => Err(LoadError::Reported { stage, reason, hint }.into()),
            (_, Some(said)) => Ok((said, output)),
            _ => Err(self.gave_up(&end, out_of_time, panicked).into()),
        }
    }

    /// Why a child is gone that has said nothing.
    fn gave_up(&self, end: &End, out_of_time: bool, panicked: Option<String>) -> LoadError {
        let CompileLimits { time, memory, .. } = self.limits;
        let signal = match end {
            End::Killed { signal } => Signal::from_named_raw(*signal),
            _ => None,
        };
        if out_of_time {
            return LoadError::CompileTime { limit: time };
        }
        let reason = match signal {
            Some(Signal::XCPU) => return LoadError::CompileTime { limit: time },
            // what a failed allocation ends with, and nothing else here
            Some(Signal::ABORT) => return LoadError::CompileMemory { limit: memory },
            Some(_) => format!("its compiler was {end}"),
            None => match panicked {
                Some(panicked) => format!("its compiler panicked: {panicked}"),
                None => format!("its compiler {end}"),
            },
        };
        LoadError::Reported { stage: Stage::Compile, reason, hint: None }
    }
}

/// Where a guest's code is kept; none when it is not.
///
/// # Errors
/// When there is no such engine.
pub(crate) fn entry(cache: &Cache, spec: EngineSpec, guest: &Guest) -> Result<Option<PathBuf>, Error> {
    // code does not depend on the room that its instances will have
    let engines = EngineSpec { pool: None, ..spec }.engines().map_err(|error| Error::Usage(format!("{error:#}")))?;
    Ok(cache.entry(&engines.ordinary, guest))
}
