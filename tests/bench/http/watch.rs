//! A folder whose guests are live: how soon a new version answers, and what the router costs beside a pool that has a port
//! of its own.

use std::{
    fs,
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    path::Path,
    time::{Duration, Instant},
};

use guest_artifacts::HELLO_HTTP;
use tempfile::TempDir;

use super::{compare, get, load::Load, peers::Server};
use crate::harness::spread;

/// How often a guest is replaced.
const ROUNDS: u32 = 25;

pub(crate) fn run() {
    fresh();
    router();
}

/// The guest as another file: a custom section more.
fn variant(number: u32) -> Vec<u8> {
    let digits = number.to_string().into_bytes();
    let length = u8::try_from(digits.len()).unwrap();
    [fs::read(HELLO_HTTP).unwrap(), vec![0, length + 1, length], digits].concat()
}

fn put(folder: &Path, name: &str, content: &[u8]) {
    let aside = folder.join(".aside");
    fs::write(&aside, content).unwrap();
    fs::rename(aside, folder.join(name)).unwrap();
}

/// One answer on a connection of its own, if the app is there.
fn answer(address: SocketAddr, path: &str) -> Option<String> {
    let mut stream = TcpStream::connect(address).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n").unwrap();
    let mut response = String::new();
    stream.read_to_string(&mut response).unwrap();
    response.starts_with("HTTP/1.1 200").then(|| response.rsplit("\r\n").next().unwrap_or_default().to_owned())
}

/// From the rename to the first answer of another process than before.
fn replaced(folder: &Path, address: SocketAddr, content: &[u8]) -> f64 {
    let before = answer(address, "/app");
    put(folder, "app.wasm", content);
    let since = Instant::now();
    loop {
        let now = answer(address, "/app");
        if now.is_some() && now != before {
            return since.elapsed().as_secs_f64() * 1e3;
        }
        assert!(since.elapsed() < Duration::from_secs(30), "it is not taken");
    }
}

fn fresh() {
    let folder = TempDir::new().unwrap();
    let server = Server::watch(folder.path(), &[]);
    // both are compiled then, and the second time they come they are not
    let known = [variant(0), variant(1)];
    for content in &known {
        replaced(folder.path(), server.address, content);
    }
    let (mut cached, mut cold) = (vec![], vec![]);
    for round in 0..ROUNDS {
        cached.push(replaced(folder.path(), server.address, &known[round as usize % 2]));
    }
    // unlike any that this machine has compiled
    let first = std::process::id().wrapping_mul(1000);
    for round in 0..ROUNDS {
        cold.push(replaced(folder.path(), server.address, &variant(first.wrapping_add(round))));
    }
    println!("  from the rename to the first answer of the new version");
    println!("    {:<40} {} ms", "compiled before", spread(&cached));
    println!("    {:<40} {} ms", "compiled for it", spread(&cold));
}

fn router() {
    fn one(server: &Server) -> Load {
        Load::get(server.address).spread_over(1)
    }
    fn ten(server: &Server) -> Load {
        Load::get(server.address).spread_over(10)
    }
    fn hundred(server: &Server) -> Load {
        Load { connections: 100, ..Load::get(server.address).spread_over(100) }
    }
    let folders: Vec<TempDir> = (0..3).map(|_| TempDir::new().unwrap()).collect();
    let guest = fs::read(HELLO_HTTP).unwrap();
    let watch = |folder: &TempDir, apps: usize, workers: &str| {
        for app in 0..apps {
            put(folder.path(), &format!("app{app}.wasm"), &guest);
        }
        let server = Server::watch(folder.path(), &["-w", workers]);
        let is_live = |app: usize| answer(server.address, &format!("/app{app}")).is_some();
        while !(0..apps).all(is_live) {}
        Some(server)
    };
    compare(
        "hello, 64 connections (100 for as many apps), a fresh instance each",
        vec![
            ("a pool of 2 workers with its own port", Some(Server::wrun(HELLO_HTTP, 2, &[])), get),
            ("a folder, 1 app with 2 workers", watch(&folders[0], 1, "2"), one),
            ("a folder, 10 apps with 1 worker each", watch(&folders[1], 10, "1"), ten),
            ("a folder, 100 apps with 1 worker each", watch(&folders[2], 100, "1"), hundred),
        ],
    );
}
