//! `wrun:guest` for core modules: the same interfaces that components import and export, by the canonical ABI, spelled out.
//!
//! A component's engine lowers and lifts by itself. A module that shares its memory cannot be one, so its side of the ABI is
//! what its bindings generated, and the host's side is here: flat parameters, results through a pointer, memory for
//! strings from `cabi_realloc`. Whatever a guest hands over is copied out of the shared memory first and then looked at.

use std::time::Duration;

use wasmtime::{AsContextMut, Caller, Extern, Linker, Trap, TypedFunc};

use super::{Running, State, Task, memory::Memory};
use crate::{
    message::{Message, MessageError},
    sandbox::{Answer, Full, Received},
};

/// What a guest exports as its handler, and what frees what that returns.
const HANDLE: &str = "wrun:guest/handler@0.1.0#handle";
const HANDLE_POST: &str = "cabi_post_wrun:guest/handler@0.1.0#handle";
/// What makes its threads.
pub(super) const START: &str = "wrun:guest/thread-group@0.1.0#start";
/// What gives the host memory.
const REALLOC: &str = "cabi_realloc";

/// A guest's side of the ABI does what it must not.
fn broken(what: impl std::fmt::Display) -> wasmtime::Error {
    wasmtime::format_err!("the guest breaks the canonical ABI: {what}")
}

/// Links what a module may import of `wrun:guest`.
pub(super) fn link(linker: &mut Linker<State>) -> wasmtime::Result<()> {
    linker.func_wrap("wrun:guest/worker@0.1.0", "get-identity", get_identity)?;
    linker.func_wrap("wrun:guest/worker@0.1.0", "get-data", get_data)?;
    linker.func_wrap("wrun:guest/mailbox@0.1.0", "send", send)?;
    linker.func_wrap("wrun:guest/mailbox@0.1.0", "receive", receive)?;
    linker.func_wrap("wrun:guest/thread@0.1.0", "serve", serve)?;
    Ok(())
}

/// A function that the calling instance exports.
fn export<P, R>(caller: &mut Caller<'_, State>, name: &str) -> wasmtime::Result<TypedFunc<P, R>>
where
    P: wasmtime::WasmParams,
    R: wasmtime::WasmResults,
{
    let function = caller.get_export(name).and_then(Extern::into_func);
    let function = function.ok_or_else(|| broken(format!("it does not export `{name}`")))?;
    function.typed(&*caller).map_err(|error| broken(format!("its `{name}` has another type: {error}")))
}

/// Copies a text into memory that the guest gives for it.
fn lower(caller: &mut Caller<'_, State>, text: &str) -> wasmtime::Result<(u32, u32)> {
    let realloc = export(caller, REALLOC)?;
    lower_with(caller, &realloc, text)
}

type Realloc = TypedFunc<(u32, u32, u32, u32), u32>;

fn lower_with(caller: &mut Caller<'_, State>, realloc: &Realloc, text: &str) -> wasmtime::Result<(u32, u32)> {
    let length = u32::try_from(text.len()).map_err(|_| broken("a text of 4 GiB"))?;
    let pointer = realloc.call(caller.as_context_mut(), (0, 0, 1, length))?;
    memory(caller).write(pointer, text.as_bytes()).map_err(|_| broken("the memory that it gives is not there"))?;
    Ok((pointer, length))
}

fn memory<'a>(caller: &'a Caller<'_, State>) -> Memory<'a> {
    Memory(&caller.data().group().memory)
}

/// Writes what a function returns.
fn return_at(caller: &Caller<'_, State>, pointer: u32, bytes: &[u8]) -> wasmtime::Result<()> {
    memory(caller).write(pointer, bytes).map_err(|_| Trap::MemoryOutOfBounds.into())
}

/// Numbers as they lie in memory.
fn words<const N: usize>(words: [u32; N]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn get_identity(mut caller: Caller<'_, State>, result: u32) -> wasmtime::Result<()> {
    let Running { group, worker, .. } = caller.data().running();
    let identity = group.setup.identity.clone();
    let id = worker.unwrap_or(identity.id);
    let (name, length) = lower(&mut caller, &identity.name)?;
    let kind = u32::from(!identity.process);
    return_at(
        &caller,
        result,
        &words([id, kind, identity.count, identity.generation, std::process::id(), name, length]),
    )
}

fn get_data(mut caller: Caller<'_, State>, result: u32) -> wasmtime::Result<()> {
    let group = caller.data().group().clone();
    let (data, length) = lower(&mut caller, group.setup.data.as_str())?;
    return_at(&caller, result, &words([data, length]))
}

/// A message as it lies in memory. One that is too long is not copied.
fn message(caller: &Caller<'_, State>, pointer: u32, length: u32) -> wasmtime::Result<Result<String, MessageError>> {
    let max = caller.data().group().setup.limits.message_max.as_usize();
    let length_host = length as usize;
    if length_host > max {
        return Ok(Err(MessageError::TooLong { length: length_host, max }));
    }
    let bytes = memory(caller).read(pointer, length).map_err(|_| broken("a text lies outside of its memory"))?;
    String::from_utf8(bytes).map(Ok).map_err(|_| broken("a text is not UTF-8"))
}

fn send(mut caller: Caller<'_, State>, pointer: u32, length: u32, result: u32) -> wasmtime::Result<()> {
    // result<_, send-error>: the error's cases in the order of `wit/mailbox.wit`, its payload eight bytes further on
    let ok = || words([0; 6]);
    let error = |case: u32, low: u32, high: u32| words([1, 0, case, 0, low, high]);
    let (group, worker) = (caller.data().group().clone(), caller.data().running().worker);
    let max = group.setup.limits.message_max;
    let checked = message(&caller, pointer, length)?.and_then(|text| Message::check(text.as_bytes(), max.as_usize()));
    let returned = match checked {
        Err(MessageError::TooLong { .. }) => {
            let bytes = max.0.to_le_bytes();
            let [low, high] = [0, 4].map(|at| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes")));
            error(1, low, high)
        }
        Err(reason) => {
            let (text, length) = lower(&mut caller, &reason.to_string())?;
            error(0, text, length)
        }
        Ok(message) => match group.send(worker, message) {
            Some(Ok(())) => ok(),
            Some(Err(Full)) => error(2, 0, 0),
            None => error(3, 0, 0),
        },
    };
    return_at(&caller, result, &returned)
}

fn receive(mut caller: Caller<'_, State>, timed: u32, timeout_ms: i64, result: u32) -> wasmtime::Result<()> {
    let group = caller.data().group().clone();
    let within = (timed != 0).then(|| Duration::from_millis(timeout_ms.cast_unsigned()));
    let received = group.receive(within);
    let returned = match received {
        Received::Message(_, text) => {
            let (text, length) = lower(&mut caller, &text)?;
            words([0, text, length])
        }
        Received::Closed => words([1, 0, 0]),
        Received::TimedOut => words([1, 1, 0]),
    };
    return_at(&caller, result, &returned)
}

/// Makes the calling thread a worker: hands it messages until there are no more.
fn serve(mut caller: Caller<'_, State>, worker: u32) -> wasmtime::Result<()> {
    let group = caller.data().group().clone();
    let handle: TypedFunc<(u32, u32), u32> = export(&mut caller, HANDLE)?;
    let post: TypedFunc<u32, ()> = export(&mut caller, HANDLE_POST)?;
    let realloc: Realloc = export(&mut caller, REALLOC)?;
    let Some(index) = group.enter(worker) else {
        return Err(broken(format!("it makes worker {worker} of {}, or makes it twice", group.setup.identity.count)));
    };
    if let Some(running) = &mut caller.data_mut().running {
        running.worker = Some(worker);
        running.thread.name = format!("worker-{worker}");
        group.name_thread(&running.thread);
    }
    while let Some((Task { id, message }, more)) = group.work.next(index) {
        let (pointer, length) = lower_with(&mut caller, &realloc, &message)?;
        drop(message);
        let returned = handle.call(caller.as_context_mut(), (pointer, length))?;
        let answer = lift_answer(&caller, returned)?;
        post.call(caller.as_context_mut(), returned)?;
        match answer {
            Ok(answer) => group.answers.answer(worker, id, answer, more),
            Err(_) => return Err(super::TooLong.into()),
        }
    }
    group.leave();
    Ok(())
}

/// Copies a `result<option<json>, json>`.
fn lift_answer(caller: &Caller<'_, State>, pointer: u32) -> wasmtime::Result<Result<Answer, MessageError>> {
    let bytes = memory(caller).read(pointer, 16).map_err(|_| broken("its answer lies outside of its memory"))?;
    let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
    let text = |at: usize| message(caller, word(at), word(at + 4));
    Ok(match (bytes[0], bytes[4]) {
        (0, 0) => Ok(Answer::NoReply),
        (0, 1) => text(8)?.map(Answer::Reply),
        (1, _) => text(4)?.map(Answer::Error),
        _ => return Err(broken("its answer is no case of a result")),
    })
}
