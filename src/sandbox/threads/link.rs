//! What a module of a group is linked with: a memory of its own, and what makes threads, grows that memory and waits there.

use std::{sync::Arc, time::Duration};

use wasmtime::{Caller, Engine, ExternType, Linker, MemoryType, SharedMemory, Store, Trap, WaitResult};

use super::{Own, Program, Running, State, canonical, parking::Stopped, rewrite, wasi};
use crate::{
    limits::Bytes,
    outcome::Stage,
    sandbox::{LoadError, Shape, guest, instance, mismatch, module_link_error},
};

/// The bytes of a page.
const PAGE: u64 = 1 << 16;

/// The shared memory could not grow: the end of the group.
#[derive(Debug, thiserror::Error)]
#[error("memory limit")]
pub(super) struct MemoryFull;

/// Links a module, as a guest of this shape, with a memory that grows to this much and no further.
///
/// # Errors
/// When it imports what is not offered, or its memory is not one that can be shared or does not fit.
pub(in crate::sandbox) fn link(
    engine: &Engine,
    module: &wasmtime::Module,
    shape: Shape,
    limit: Bytes,
) -> Result<Program, LoadError> {
    let shared = module.imports().filter_map(|import| {
        let memory = import.ty().memory().filter(|memory| memory.is_shared()).cloned()?;
        Some((import.module().to_owned(), import.name().to_owned(), memory))
    });
    let shared: Vec<_> = shared.collect();
    let [(namespace, name, declared)] = &shared[..] else {
        return Err(LoadError::TooMany { what: "shared memories", max: 1 });
    };
    let memory = new_memory(engine, declared, limit)?;
    let mut linker = Linker::new(engine);
    wasi::link(&mut linker)
        .and_then(|()| canonical::link(&mut linker))
        .and_then(|()| link_threads(&mut linker))
        .expect("no name is linked twice");
    let of_nobody = Store::new(engine, State { running: None, own: Own { budget: Arc::default(), bytes: 0 } });
    linker.define(&of_nobody, namespace, name, memory.clone()).map_err(|error| mismatch(&error))?;
    let is_function = |name: &str| matches!(module.get_export(name), Some(ExternType::Func(_)));
    let needed: &[&str] = match shape {
        Shape::Command if !instance::is_start(module.get_export("_start")) => return Err(LoadError::bad_start()),
        Shape::Handler => &[canonical::START],
        _ => &[],
    };
    if let Some(missing) = needed.iter().find(|name| !is_function(name)) {
        let reason = format!("it does not export `{missing}`, which makes its threads");
        return Err(LoadError::Mismatch { reason });
    }
    let pre = linker.instantiate_pre(module).map_err(module_link_error)?;
    Ok(Program { engine: engine.clone(), pre, memory, shape })
}

/// The memory of a group, at most as large as the limit: that bounds it, and nothing else does.
fn new_memory(engine: &Engine, declared: &MemoryType, limit: Bytes) -> Result<SharedMemory, LoadError> {
    if declared.is_64() || declared.page_size() != PAGE {
        let reason = "its shared memory has 64-bit addresses or pages of another size".into();
        return Err(LoadError::Mismatch { reason });
    }
    let minimum = declared.minimum();
    let maximum = declared.maximum().unwrap_or(minimum).min(limit.0 / PAGE);
    if minimum > maximum {
        return Err(LoadError::NeedsMemory { needs: Bytes(minimum * PAGE), limit });
    }
    let pages = |pages: u64| u32::try_from(pages).map_err(|_| LoadError::Mismatch { reason: "its memory".into() });
    SharedMemory::new(engine, MemoryType::shared(pages(minimum)?, pages(maximum)?)).map_err(|error| {
        LoadError::Reported { stage: Stage::Start, reason: guest::one_line(&format!("{error:#}")), hint: None }
    })
}

/// Links what makes threads, and what stands for instructions that were replaced.
fn link_threads(linker: &mut Linker<State>) -> wasmtime::Result<()> {
    linker.func_wrap("wasi", "thread-spawn", |caller: Caller<'_, State>, argument: i32| {
        let Running { group, worker, .. } = caller.data().running();
        // a guest that is told of a failure would print it
        caller.data().check_stopped()?;
        Ok(group.spawn(argument, *worker).unwrap_or(-1))
    })?;
    linker.func_wrap(rewrite::MODULE, "grow", |caller: Caller<'_, State>, pages: i32| -> wasmtime::Result<i32> {
        let group = caller.data().group();
        let pages = u64::from(pages.cast_unsigned());
        match group.memory.grow(pages) {
            Ok(before) => Ok(i32::try_from(before).unwrap_or(-1)),
            // what the guest itself has declared is its own affair
            Err(_) if group.memory.size() + pages > group.declared => Ok(-1),
            Err(_) => Err(MemoryFull.into()),
        }
    })?;
    linker.func_wrap(
        rewrite::MODULE,
        "wait32",
        |caller: Caller<'_, State>, address: u32, expected: u32, timeout: i64, offset: u32| {
            wait(&caller, address, offset, timeout, |memory, address, timeout| {
                memory.atomic_wait32(address, expected, timeout)
            })
        },
    )?;
    linker.func_wrap(
        rewrite::MODULE,
        "wait64",
        |caller: Caller<'_, State>, address: u32, expected: u64, timeout: i64, offset: u32| {
            wait(&caller, address, offset, timeout, |memory, address, timeout| {
                memory.atomic_wait64(address, expected, timeout)
            })
        },
    )?;
    Ok(())
}

/// An atomic wait that the end of the group ends.
fn wait(
    caller: &Caller<'_, State>,
    address: u32,
    offset: u32,
    timeout: i64,
    wait: impl FnOnce(&SharedMemory, u64, Option<Duration>) -> Result<WaitResult, Trap>,
) -> wasmtime::Result<u32> {
    let Running { group, place, .. } = caller.data().running();
    let address = u64::from(address) + u64::from(offset);
    let timeout = u64::try_from(timeout).ok().map(Duration::from_nanos);
    let waited = group.parking.wait_at(*place, address, || wait(&group.memory, address, timeout));
    Ok(match waited.map_err(|Stopped| State::interrupted())?? {
        WaitResult::Ok => 0,
        WaitResult::Mismatch => 1,
        WaitResult::TimedOut => 2,
    })
}
