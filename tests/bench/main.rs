//! How fast wrun is, each figure beside what it is measured against, in the same run: `cargo bench`, or one part of it
//! with `cargo bench -- start`, `-- children`, `-- messages`, `-- pool`, `-- http`, `-- watch`, `-- threads`, `-- windows`
//! or `-- ci`.
//!
//! Peers that are installed take part: `node`, and `wasmtime` (or what `$WASMTIME` names). Without them, what the
//! machine itself allows remains: a process that does nothing, two processes on a bare socket pair, the bare engine.

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a bench that cannot go on says where, and prints")]

mod children;
mod ci;
mod harness;
mod http;
mod messages;
mod pool;
mod start;
mod threads;
mod windows;

fn main() {
    wrun::init();
    if harness::is_echo() {
        return harness::echo();
    }
    if let Some(threads) = http::hyper_threads() {
        return http::hyper(threads);
    }
    let wanted: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    let parts: [(&str, fn()); 9] = [
        ("start", start::run),
        ("children", children::run),
        ("messages", messages::run),
        ("pool", pool::run),
        ("http", http::run),
        ("watch", http::watch::run),
        ("threads", threads::run),
        ("windows", windows::run),
        ("ci", ci::run),
    ];
    println!("median [least, most]; a ratio is that of neighbours in time, over the rounds\n");
    for (name, run) in parts {
        if wanted.is_empty() || wanted.iter().any(|wanted| name.contains(wanted.as_str())) {
            println!("{name}");
            run();
            println!();
        }
    }
}
