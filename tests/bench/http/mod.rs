//! How a port is served: requests a second and their times, what a kill and a reload cost, memory; beside a bare hyper,
//! Node's cluster and `wasmtime serve`.

mod load;
mod peers;
pub(crate) mod watch;

use std::{
    io::BufRead,
    time::{Duration, Instant},
};

use guest_artifacts::{ECHO, HELLO_HTTP, STREAM};
use rustix::process::{Signal, kill_process};

pub(crate) use self::peers::{hyper, hyper_threads};
use self::{
    load::{Figures, Load},
    peers::Server,
};
use crate::harness::{spread, without_walls};

const ROUNDS: usize = 5;

pub(crate) fn run() {
    for workers in [1, 2] {
        hello(workers);
    }
    walls();
    beside_wasmtime();
    handlers();
    kills();
    reloads();
    memory();
}

/// One server, and the load on it.
type Probe = (&'static str, Option<Server>, fn(&Server) -> Load);

fn get(server: &Server) -> Load {
    Load::get(server.address)
}

fn hello(workers: u32) {
    compare(
        &format!("hello, 64 connections, {workers} worker{}", if workers == 1 { "" } else { "s" }),
        vec![
            ("wrun, a fresh instance each", Some(Server::wrun(HELLO_HTTP, workers, &[])), get),
            ("wrun, instances reused", Some(Server::wrun(HELLO_HTTP, workers, &["--instance", "worker"])), get),
            ("bare hyper", Some(Server::hyper(workers)), get),
            ("Node, `cluster`", Server::node(workers), get),
        ],
    );
}

/// What requests pay for the jail.
fn walls() {
    let start = || Server::wrun(HELLO_HTTP, 2, &[]);
    compare(
        "hello, 64 connections, 2 workers, a fresh instance each",
        vec![
            ("in the jail", Some(start()), get),
            ("in the jail, another pool", Some(start()), get),
            ("without Landlock and seccomp", Some(without_walls(start)), get),
        ],
    );
}

/// The same guest in both: one that asks for nothing of wrun's, and answers one chunk.
fn beside_wasmtime() {
    let reuse = ["--max-instance-reuse-count", "1000", "--max-instance-concurrent-reuse-count", "64"];
    compare(
        "one chunk, 64 connections, 2 workers",
        vec![
            ("wrun, a fresh instance each", Some(Server::wrun(STREAM, 2, &[])), get),
            ("wrun, instances reused", Some(Server::wrun(STREAM, 2, &["--reuse", "1000"])), get),
            ("wasmtime serve, a fresh instance each", Server::wasmtime(STREAM, &[]), get),
            ("wasmtime serve, instances reused", Server::wasmtime(STREAM, &reuse), get),
        ],
    );
}

fn handlers() {
    fn post(server: &Server) -> Load {
        Load::post(server.address, r#"{"numbers":[1,2,3],"name":"a small message"}"#)
    }
    compare(
        "a handler, POST of 44 bytes, 64 connections, 2 workers",
        vec![
            ("wrun, instances reused", Some(Server::wrun(ECHO, 2, &[])), post),
            ("wrun, a fresh instance each", Some(Server::wrun(ECHO, 2, &["--instance", "task"])), post),
            ("bare hyper", Some(Server::hyper(2)), post),
            ("Node, `cluster`", Server::node(2), post),
        ],
    );
}

/// Loads all servers in turn, round by round.
fn compare(what: &str, probes: Vec<Probe>) {
    let probes: Vec<_> = probes.into_iter().filter_map(|(name, server, load)| Some((name, server?, load))).collect();
    let mut rounds: Vec<Vec<Figures>> = probes.iter().map(|_| vec![]).collect();
    for (_, server, load) in &probes {
        Load { time: Duration::from_millis(500), ..load(server) }.run();
    }
    for _ in 0..ROUNDS {
        for ((_, server, load), figures) in probes.iter().zip(&mut rounds) {
            figures.push(load(server).run());
        }
    }
    println!("  {what}");
    for ((name, ..), figures) in probes.iter().zip(&rounds) {
        let of = |figure: fn(&Figures) -> f64| figures.iter().map(figure).collect::<Vec<_>>();
        let failed: usize = figures.iter().map(|figures| figures.failed).sum();
        let shares: Vec<f64> = figures.iter().filter_map(least_share).collect();
        let shares = if shares.is_empty() { String::new() } else { format!(", least share {} %", spread(&shares)) };
        println!(
            "    {name:<40} {:>28} /s, p50 {} us, p99 {} us, {failed} failed{shares}",
            spread(&of(|figures| figures.per_second)),
            spread(&of(|figures| figures.p50_us)),
            spread(&of(|figures| figures.p99_us)),
        );
    }
    for ours in 0..probes.len().min(2) {
        for theirs in 2..probes.len() {
            let ratio = |figure: fn(&Figures) -> f64| {
                let pairs = rounds[ours].iter().zip(&rounds[theirs]);
                spread(&pairs.map(|(ours, theirs)| figure(ours) / figure(theirs)).collect::<Vec<_>>())
            };
            let (per_second, p99) = (ratio(|figures| figures.per_second), ratio(|figures| figures.p99_us));
            println!("    {} / {}: {per_second} x the requests, {p99} x the p99", probes[ours].0, probes[theirs].0);
        }
    }
}

/// What the worker with the fewest answers gave, in percent.
fn least_share(figures: &Figures) -> Option<f64> {
    let count = |count: &usize| f64::from(u32::try_from(*count).unwrap());
    let all: f64 = figures.by_worker.values().map(count).sum();
    let least = figures.by_worker.values().map(count).fold(f64::INFINITY, f64::min);
    (figures.by_worker.len() > 1).then(|| least / all * 100.0)
}

/// A load on which something happens.
fn eventful(server: &Server) -> Load {
    Load { connections: 32, time: Duration::from_millis(800), is_patient: true, ..Load::get(server.address) }
}

/// One worker of two is killed under load, each time in a new pool.
fn kills() {
    let killed = |name: &str, start: &dyn Fn() -> Option<Server>, rounds: usize| {
        let (mut failed, mut hung, mut replaced) = (0, 0, vec![]);
        for _ in 0..rounds {
            let Some(server) = start() else { return };
            Load { time: Duration::from_millis(200), ..Load::get(server.address) }.run();
            let victim = server.workers()[0];
            let (killed, at) = std::sync::mpsc::channel();
            let figures = eventful(&server).run_with(move || {
                std::thread::sleep(Duration::from_millis(200));
                killed.send(Instant::now()).unwrap();
                kill_process(victim, Signal::KILL).unwrap();
            });
            let at = at.recv().unwrap();
            failed += figures.failed;
            hung += figures.hung;
            let successor = figures.first_heard.values().filter(|heard| **heard > at).min();
            replaced.extend(successor.map(|heard| heard.duration_since(at).as_secs_f64() * 1e3));
        }
        println!(
            "    {name:<40} {rounds} kills: {failed} requests failed, {hung} hung; first answer of the successor after {} ms",
            spread(&replaced)
        );
    };
    println!("  kill -9 of one worker of two, 32 connections");
    killed("wrun", &|| Some(Server::wrun(HELLO_HTTP, 2, &[])), 20);
    killed("Node, `cluster`", &|| Server::node(2), 20);
}

/// All workers are replaced under load, again and again.
fn reloads() {
    let (server, mut stderr) = Server::wrun_that_tells(HELLO_HTTP, 2);
    let pid = server.pid();
    let rounds = 20;
    let (took, times) = std::sync::mpsc::channel();
    let load = Load { time: Duration::from_secs(6), ..eventful(&server) };
    let figures = load.run_with(move || {
        for _ in 0..rounds {
            std::thread::sleep(Duration::from_millis(200));
            let since = Instant::now();
            kill_process(pid, Signal::HUP).unwrap();
            let mut line = String::new();
            while !line.contains("reloaded") {
                line.clear();
                assert!(stderr.read_line(&mut line).unwrap() > 0, "it has ended");
            }
            took.send(since.elapsed().as_secs_f64() * 1e3).unwrap();
        }
        // nobody reads on: what it still tells must not stop it
        std::thread::spawn(move || stderr.lines().for_each(drop));
    });
    let took: Vec<f64> = times.iter().collect();
    println!("  reload of two workers, 32 connections");
    println!(
        "    {:<40} {rounds} reloads: {} requests failed, {} hung; the new workers took over after {} ms",
        "wrun",
        figures.failed,
        figures.hung,
        spread(&took)
    );
}

fn memory() {
    println!("  memory of a worker (PSS), of two: idle, and after a load");
    let measure = |name: &str, server: Option<Server>| {
        let Some(server) = server else { return };
        std::thread::sleep(Duration::from_millis(500));
        let idle = server.memory();
        Load::get(server.address).run();
        println!("    {name:<40} {idle:.1} MiB, {:.1} MiB", server.memory());
    };
    measure("wrun, a fresh instance each", Some(Server::wrun(HELLO_HTTP, 2, &[])));
    measure("wrun, instances reused", Some(Server::wrun(HELLO_HTTP, 2, &["--instance", "worker"])));
    measure("Node, `cluster`", Server::node(2));
    measure("wasmtime serve (its one process)", Server::wasmtime(STREAM, &[]));
}
