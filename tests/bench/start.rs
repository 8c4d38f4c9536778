//! How long until a guest runs.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    time::Instant,
};

use guest_artifacts::{ECHO, HELLO, HELLO_P1, WHOAMI};
use rustix::process::{Pid, Signal, kill_process};
use wasmtime::{
    Config, Engine,
    component::{Component, Linker, ResourceTable},
};
use wasmtime_wasi::{WasiCtx, WasiCtxView, WasiView};
use wrun::{Isolation, cluster::Answer, event::Event, message::Message};

use crate::harness::{Node, Probe, WRUN, cache_dir, compare, on_a_thread, pool, time, with_pool, without_walls};

pub(crate) fn run() {
    commands();
    engine();
    workers();
}

/// A whole process, from its start to its end, in milliseconds.
fn millis(program: &str, args: &[&str], says: &str) -> f64 {
    let mut output = vec![];
    let took = time(|| {
        output = Command::new(program).args(args).env_clear().stderr(Stdio::inherit()).output().unwrap().stdout;
    });
    assert_eq!(String::from_utf8_lossy(&output), says);
    took.as_secs_f64() * 1e3
}

fn commands() {
    let cache = cache_dir();
    let cache = cache.to_str().unwrap();
    let hello = "Hello, world!\n";
    let wasmtime = std::env::var("WASMTIME").unwrap_or_else(|_| "wasmtime".into());
    let has_wasmtime = Command::new(&wasmtime).arg("--version").stdout(Stdio::null()).status().is_ok();
    let config = Path::new(env!("CARGO_TARGET_TMPDIR")).join("wasmtime-cache.toml");
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("wasmtime-cache");
    fs::write(&config, format!("[cache]\ndirectory = \"{}\"\n", folder.display())).unwrap();
    let warm = format!("-Ccache-config={}", config.display());

    let cases =
        [("warm `run`, component", HELLO, true), ("warm `run`, module", HELLO_P1, true), ("cold `run`", HELLO, false)];
    for (what, guest, is_warm) in cases {
        let ours: &[&str] = if is_warm { &["run", "--cache-dir", cache, guest] } else { &["run", "--no-cache", guest] };
        let theirs: &[&str] = if is_warm { &["run", &warm, guest] } else { &["run", "-Ccache=n", guest] };
        let mut probes: Vec<Probe<'_>> = vec![("wrun", Box::new(|| millis(WRUN, ours, hello)))];
        if has_wasmtime {
            probes.push(("wasmtime", Box::new(|| millis(&wasmtime, theirs, hello))));
        }
        probes.push(("a process that does nothing", Box::new(|| millis("/bin/true", &[], ""))));
        compare(what, "ms", 25, probes);
    }
}

struct State(WasiCtx, ResourceTable);

impl WasiView for State {
    fn ctx(&mut self) -> WasiCtxView<'_> {
        WasiCtxView { ctx: &mut self.0, table: &mut self.1 }
    }
}

/// The bare engine's share in all this.
fn engine() {
    let mut config = Config::new();
    config.concurrency_support(false);
    let engine = Engine::new(&config).unwrap();
    let code = Path::new(env!("CARGO_TARGET_TMPDIR")).join("echo.cwasm");
    fs::write(&code, engine.precompile_component(&fs::read(ECHO).unwrap()).unwrap()).unwrap();
    // SAFETY: the engine made the file just now.
    let map = || unsafe { Component::deserialize_file(&engine, &code) }.unwrap();
    let component = map();
    let mut linker = Linker::<State>::new(&engine);
    wasmtime_wasi::p2::add_to_linker_sync(&mut linker).unwrap();
    linker.define_unknown_imports_as_traps(&component).unwrap();
    let pre = linker.instantiate_pre(&component).unwrap();
    let average = |run: &dyn Fn()| {
        let rounds = 200;
        time(|| (0..rounds).for_each(|_| run())).as_secs_f64() * 1e6 / f64::from(rounds)
    };
    compare("map compiled code", "us", 15, vec![("the engine", Box::new(|| average(&|| drop(map()))))]);
    let instantiate = || {
        let mut store = wasmtime::Store::new(&engine, State(WasiCtx::builder().build(), ResourceTable::new()));
        pre.instantiate(&mut store).unwrap();
    };
    compare("make an instance", "us", 15, vec![("the engine", Box::new(|| average(&instantiate)))]);
}

fn workers() {
    let mut node = Node::start();
    let first_reply = |isolation| {
        let start = Instant::now();
        with_pool(pool(WHOAMI, 1).isolation(isolation), |cluster| async move {
            let Answer::Reply(_) = cluster.request(Message::null()).await.unwrap() else { panic!("no reply") };
            start.elapsed().as_secs_f64() * 1e3
        })
    };
    let mut probes: Vec<Probe<'_>> = vec![("wrun, a pool of one", Box::new(|| first_reply(Isolation::Process)))];
    if let Some(node) = &mut node {
        probes.push(("Node, `fork`", Box::new(|| node.ask("fork") / 1e3)));
    }
    compare("start to first message", "ms", 15, probes);
    compare(
        "start to first message",
        "ms",
        51,
        vec![
            ("in the jail", Box::new(|| on_a_thread(|| first_reply(Isolation::Process)))),
            ("with namespaces of its own (`jail`)", Box::new(|| on_a_thread(|| first_reply(Isolation::Jail)))),
            ("without Landlock and seccomp", Box::new(|| without_walls(|| first_reply(Isolation::Process)))),
        ],
    );

    // what the pool's users feel: from the kill to the moment when a new worker takes tasks
    let replaced = || {
        with_pool(pool(WHOAMI, 1), |cluster| async move {
            let mut events = cluster.events();
            let Answer::Reply(who) = cluster.request(Message::null()).await.unwrap() else { panic!("no reply") };
            let pid = who.to::<serde_json::Value>().unwrap()["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok());
            let start = Instant::now();
            kill_process(pid.and_then(Pid::from_raw).unwrap(), Signal::KILL).unwrap();
            while !matches!(events.recv().await.unwrap(), Event::Online { .. }) {}
            start.elapsed().as_secs_f64() * 1e3
        })
    };
    compare("kill -9 to ready again", "ms", 25, vec![("wrun", Box::new(replaced))]);

    let memory = || {
        with_pool(pool(WHOAMI, 1), |cluster| async move {
            let Answer::Reply(who) = cluster.request(Message::null()).await.unwrap() else { panic!("no reply") };
            let pid = who.to::<serde_json::Value>().unwrap()["pid"].to_string();
            let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
            let pss = rollup.lines().find_map(|line| line.strip_prefix("Pss:")?.trim().strip_suffix(" kB")).unwrap();
            pss.trim().parse::<f64>().unwrap() / 1024.0
        })
    };
    compare("PSS of an idle worker", "MiB", 5, vec![("wrun", Box::new(memory))]);
}
