//! Misuses windows in every way that it can. Each act answers what it found.

use std::{
    alloc::{Layout, alloc, alloc_zeroed, dealloc},
    arch::wasm32::{memory_grow, memory_size, unreachable},
    cell::Cell,
    hint::black_box,
    mem, process, slice,
};

use serde::Deserialize;
use serde_json::{Value, json};
use wrun_guest::{
    bindings::wrun::guest::window as raw,
    handler, mailbox,
    window::{Chunk, Window, WindowError, buffers, windows},
    worker,
};

const PAGE: usize = 64 << 10;

/// Where what a guest begins with lies: behind its stack.
const DATA: usize = 16 * PAGE;

/// What stands for a secret, in the buffers of tests.
const SECRET: u8 = 0xa7;

thread_local! {
    /// A window that is kept from one task to the next.
    static HELD: Cell<Option<Window>> = const { Cell::new(None) };
}

#[derive(Deserialize)]
struct Task {
    act: Option<String>,
    #[serde(default)]
    count: usize,
    #[serde(flatten)]
    chunk: Option<Chunk>,
}

fn handle(task: Task) -> Result<Value, String> {
    let own = match worker::data::<Value>() {
        Ok(Value::String(act)) => Some(act),
        _ => None,
    };
    let act = task.act.or(own).ok_or("expected an act")?;
    let chunk = task.chunk.unwrap_or(Chunk { index: 0, offset: 0, length: 2 * PAGE as u64, before: 0, after: 0 });
    match &*act {
        "errors" => errors(),
        "own" => own_range(&chunk),
        "private" => private(&chunk),
        "many" => many(task.count),
        "free" => free(),
        "grow" => grow(),
        "pass-back" => pass_back(),
        "leave" => leave().map(|window| json!(window > 0)),
        "trap" => leave().map(|_| unreachable()),
        "exit" => leave().map(|_| process::exit(7)),
        "spin" => leave().map(|_| spin()),
        "static" => Ok(over_statics()),
        "leave-static" => {
            let _ = attach(0, raw_memory(DATA, DATA + PAGE));
            unreachable()
        }
        "attach" => attach_often(task.count, &chunk),
        // takes whatever else is in its message
        "sink" => Ok(json!(true)),
        "hold" => hold(),
        "scan" => Ok(scan()),
        "fragments" => fragments(task.count),
        _ => Err(format!("no such act: {act}")),
    }
}

fn attach(offset: u64, region: &[u8]) -> Result<u32, raw::WindowError> {
    raw::attach("input", offset, region)
}

/// As [`attach`], with the error as a text.
fn attached(offset: u64, region: &[u8]) -> Result<u32, String> {
    attach(offset, region).map_err(|error| error.name().to_owned())
}

fn detach(window: u32) -> Result<(), String> {
    raw::detach(window).map_err(|error| error.name().to_owned())
}

/// Zeros at the edge of a page, never given back.
fn block(pages: usize) -> &'static mut [u8] {
    let layout = Layout::from_size_align(pages * PAGE, PAGE).expect("a size");
    // SAFETY: zeros, of this size, for ever
    unsafe { slice::from_raw_parts_mut(alloc_zeroed(layout), pages * PAGE) }
}

/// Its own memory, as bytes that may change at any time.
fn raw_memory(from: usize, to: usize) -> &'static [u8] {
    // SAFETY: all of it is there; what this guest makes of what it reads does not matter
    unsafe { slice::from_raw_parts(black_box(from as *const u8), to - from) }
}

fn sum(bytes: &[u8]) -> u64 {
    black_box(bytes).iter().map(|byte| u64::from(*byte)).sum()
}

/// Ends all windows that there are.
fn end_all() {
    for window in windows() {
        raw::detach(window.window).expect("it is there");
    }
}

fn errors() -> Result<Value, String> {
    let memory = block(4);
    let told = |result: Result<u32, raw::WindowError>| match result {
        Ok(_) => json!("attached"),
        Err(error) => json!(error.name()),
    };
    let number = attached(0, &memory[..PAGE])?;
    let found = json!({
        "again": told(attach(0, &memory[..PAGE])),
        "within": told(attach(PAGE as u64 / 2, &memory[PAGE / 2..PAGE])),
        "misaligned": told(attach(0, &memory[PAGE + 1..2 * PAGE])),
        "unknown": told(raw::attach("none", 0, &memory[PAGE..2 * PAGE])),
        "beyond": told(attach(1 << 40, &memory[PAGE..2 * PAGE])),
        "overflow": told(attach(u64::MAX - (PAGE as u64 - 1), &memory[PAGE..2 * PAGE])),
        "no-output": told(raw::attach("output", 0, &memory[PAGE..2 * PAGE])),
        "empty": told(attach(0, &memory[2 * PAGE..2 * PAGE])),
        "windows": windows().len(),
        "detach": detach(number).is_ok(),
        "detach-twice": detach(number).err(),
        "detach-unknown": detach(1 << 30).err(),
        "and-again": told(attach(0, &memory[..PAGE])),
    });
    end_all();
    Ok(found)
}

/// Writes to the output, at its own chunk and elsewhere.
fn own_range(chunk: &Chunk) -> Result<Value, String> {
    let mark = chunk.index.to_le_bytes()[0] + 1;
    let mut window = chunk.output()?;
    window.fill(mark);
    let twice = chunk.output().err();
    let around = [chunk.offset.checked_sub(1), Some(chunk.offset + chunk.length)];
    let others = around.into_iter().flatten().map(|offset| Window::of("output", offset, 1).err());
    let others = others.collect::<Vec<_>>();
    drop(window);
    let again = chunk.output()?;
    Ok(json!({
        "twice": twice,
        "others": others.iter().all(|error| *error == Some(WindowError::OutOfRange)),
        "kept": again.iter().all(|byte| *byte == mark),
    }))
}

/// Writes to an input.
fn private(chunk: &Chunk) -> Result<Value, String> {
    let mut window = chunk.input()?;
    let before = sum(&window);
    window.fill(0xff);
    let written = window.iter().all(|byte| *byte == 0xff);
    Ok(json!({"same": before == sum(&chunk.input()?[..]), "written": written}))
}

fn many(count: usize) -> Result<Value, String> {
    let memory = block(count);
    let attached = (0..count).map(|n| attached(0, &memory[n * PAGE..][..1])).collect::<Vec<_>>();
    let fits = attached.iter().filter(|it| it.is_ok()).count();
    end_all();
    Ok(json!({"fits": fits, "error": attached.into_iter().find_map(Result::err)}))
}

/// Gives memory back, and uses it for other things, while a window lies there.
fn free() -> Result<Value, String> {
    let layout = Layout::from_size_align(8 * PAGE, PAGE).expect("a size");
    // SAFETY: of a size above 0, and looked at as raw memory only
    let number = unsafe {
        let block = alloc(layout);
        let number = attached(0, slice::from_raw_parts(block, PAGE))?;
        dealloc(block, layout);
        number
    };
    // what the host writes for the guest may land there, too
    let texts: Vec<_> = (0..4).map(|_| (buffers(), worker::identity().name)).collect();
    let own = vec![7u8; 4 * PAGE];
    let found = sum(&own);
    detach(number)?;
    // what lay there may be gone, and is not looked at
    mem::forget((texts, own));
    Ok(json!({"sum": found}))
}

fn grow() -> Result<Value, String> {
    let memory = block(2);
    let number = attached(0, &memory[..PAGE])?;
    let before = sum(memory);
    let grown = memory_grow::<0>(64) != usize::MAX;
    let same = before == sum(memory);
    detach(number)?;
    Ok(json!({"grown": grown, "same": same}))
}

/// Hands a window's bytes to the host: as a message, as a name, and as the region of another window.
fn pass_back() -> Result<Value, String> {
    let window = Window::of("input", 0, PAGE as u64)?;
    let text = str::from_utf8(&window[..2]).map_err(|error| error.to_string())?;
    let name = |result: Result<u32, raw::WindowError>| result.err().map(|error| error.name().to_owned());
    Ok(json!({
        "text": text,
        "sent": mailbox::send_json(text).is_ok(),
        "named": name(raw::attach(text, 0, &window)),
        "onto": name(attach(0, &window)),
    }))
}

/// Makes a window, and copies of its pages, that nobody cleans up.
fn leave() -> Result<u32, String> {
    let memory = block(17);
    let window = attached(0, &memory[..PAGE * 16])?;
    black_box(&mut memory[2 * PAGE..]).copy_within(0..PAGE, 5);
    Ok(window)
}

fn spin() -> Value {
    println!("it spins");
    loop {
        black_box(());
    }
}

/// Puts a window over what the guest began with, its constants and variables, and takes it away.
fn over_statics() -> Value {
    let before = sum(raw_memory(DATA, DATA + PAGE));
    let detached = attach(0, raw_memory(DATA, DATA + PAGE)).map(raw::detach);
    let after = sum(raw_memory(DATA, DATA + PAGE));
    json!({"detached": detached == Ok(Ok(())), "same": before == after && before > 0})
}

/// Attaches and detaches so often, as benches count it.
fn attach_often(count: usize, chunk: &Chunk) -> Result<Value, String> {
    let length = usize::try_from(chunk.length).map_err(|error| error.to_string())?;
    let layout = Layout::from_size_align(length, PAGE).map_err(|error| error.to_string())?;
    // SAFETY: of a size above 0, never read
    let region = unsafe { slice::from_raw_parts(alloc(layout), length) };
    for _ in 0..count {
        detach(attached(0, region)?)?;
    }
    // SAFETY: allocated above
    unsafe { dealloc(region.as_ptr().cast_mut(), layout) };
    Ok(json!(count))
}

/// Reads all of a buffer, and never gives it back.
fn hold() -> Result<Value, String> {
    let length = buffers().first().ok_or("expected a buffer")?.length;
    let window = HELD.take().map_or_else(|| Window::of("input", 0, length), Ok)?;
    let sum = sum(&window);
    HELD.set(Some(window));
    Ok(json!({"worker": worker::identity().id, "sum": sum}))
}

/// Looks for what somebody else has left.
fn scan() -> Value {
    // as much memory as the one before had, and a little more
    let pages = 40usize.saturating_sub(memory_size::<0>());
    if pages > 0 {
        memory_grow::<0>(pages);
    }
    let all = raw_memory(DATA, memory_size::<0>() * PAGE);
    json!({"found": all.windows(64).any(|bytes| bytes.iter().all(|byte| *byte == SECRET))})
}

/// Attaches and detaches small windows all over its memory.
fn fragments(count: usize) -> Result<Value, String> {
    let memory = block(count);
    for n in 0..count {
        let offset = 4096 * (n % 15);
        let at = n * PAGE + offset;
        detach(attached(offset as u64, &memory[at..at + 4096])?)?;
    }
    Ok(json!(sum(memory) == 0))
}

handler!(handle);
