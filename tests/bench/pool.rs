//! How many tasks a pool of two workers does, from Rust and through the command.

use std::{
    io::Write,
    process::{Command, Stdio},
    time::Instant,
};

use guest_artifacts::{ECHO, FIB};
use wasmtime::{
    Config, Engine,
    component::{Component, Linker, ResourceTable},
};
use wasmtime_wasi::{WasiCtx, WasiCtxView, WasiView};

use crate::harness::{Probe, WRUN, cache_dir, compare};

pub(crate) fn run() {
    let count = 200_000;
    compare(
        "empty tasks, 2 workers",
        "/s",
        9,
        vec![
            ("instance reused", Box::new(|| lines(ECHO, "0", count, &[]))),
            ("instance fresh", Box::new(|| lines(ECHO, "0", count / 10, &["--instance", "task"]))),
        ],
    );
    // one or two milliseconds each
    let (tasks, n) = (1_000, "29");
    let engine = InProcess::new();
    let in_process = || 2.0 * engine.tasks_per_second(n, 100);
    let probes: Vec<Probe<'_>> = vec![
        ("wrun", Box::new(|| lines(FIB, n, tasks, &[]))),
        ("twice what one thread does in process", Box::new(in_process)),
    ];
    compare("fib(29) tasks, 2 workers", "/s", 9, probes);
}

/// JSON lines through the command, tasks a second. The start of the pool is not counted: what a single line takes is
/// taken off.
fn lines(guest: &str, line: &str, count: usize, args: &[&str]) -> f64 {
    let run = |count: usize| {
        let start = Instant::now();
        let mut child = Command::new(WRUN)
            .args(["cluster", "-w", "2", "--cache-dir", cache_dir().to_str().unwrap(), guest])
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        let input = format!("{line}\n").repeat(count);
        let writer = std::thread::spawn(move || stdin.write_all(input.as_bytes()).unwrap());
        let output = child.wait_with_output().unwrap();
        writer.join().unwrap();
        assert!(output.status.success());
        let text = String::from_utf8_lossy(&output.stdout);
        assert_eq!(text.matches("\"reply\"").count(), count);
        start.elapsed()
    };
    let start = run(1);
    let all = run(count);
    f64::from(u32::try_from(count).unwrap()) / all.saturating_sub(start).as_secs_f64()
}

struct State(WasiCtx, ResourceTable);

impl WasiView for State {
    fn ctx(&mut self) -> WasiCtxView<'_> {
        WasiCtxView { ctx: &mut self.0, table: &mut self.1 }
    }
}

/// The same guest in the bare engine, on this thread.
struct InProcess {
    engine: Engine,
    pre: wasmtime::component::InstancePre<State>,
}

impl InProcess {
    fn new() -> Self {
        let mut config = Config::new();
        config.concurrency_support(false);
        let engine = Engine::new(&config).unwrap();
        let component = Component::from_file(&engine, FIB).unwrap();
        let mut linker = Linker::new(&engine);
        wasmtime_wasi::p2::add_to_linker_sync(&mut linker).unwrap();
        linker.define_unknown_imports_as_traps(&component).unwrap();
        let pre = linker.instantiate_pre(&component).unwrap();
        Self { engine, pre }
    }

    fn tasks_per_second(&self, message: &str, count: u32) -> f64 {
        let mut store = wasmtime::Store::new(&self.engine, State(WasiCtx::builder().build(), ResourceTable::new()));
        let instance = self.pre.instantiate(&mut store).unwrap();
        let handler = instance.get_export_index(&mut store, None, "wrun:guest/handler@0.1.0").unwrap();
        let handle = instance.get_export_index(&mut store, Some(&handler), "handle").unwrap();
        let handle = instance.get_typed_func::<(&str,), (Result<Option<String>, String>,)>(&mut store, handle).unwrap();
        let start = Instant::now();
        for _ in 0..count {
            let (answer,) = handle.call(&mut store, (message,)).unwrap();
            assert_eq!(answer.unwrap().unwrap(), "{\"n\":29,\"fib\":514229}");
        }
        f64::from(count) / start.elapsed().as_secs_f64()
    }
}
