//! What is measured, and what it is measured against: servers that were started and are ended with their value.

use std::{
    convert::Infallible,
    fs,
    io::{BufRead, BufReader},
    net::{SocketAddr, TcpListener, TcpStream},
    path::Path,
    process::{Child, ChildStderr, Command, Stdio},
    time::{Duration, Instant},
};

use http_body_util::{BodyExt, Full};
use hyper::{Method, Request, Response, body::Incoming, server::conn::http1, service::service_fn};
use rustix::process::{Pid, Signal, kill_process};
use wasmtime_wasi_http::io::TokioIo;

use crate::harness::{WRUN, cache_dir};

const HYPER_ARG: &str = "--bench-hyper";

/// A server in a process of its own.
pub(super) struct Server {
    child: Child,
    pub(super) address: SocketAddr,
}

impl Drop for Server {
    fn drop(&mut self) {
        // politely: some have children of their own
        let _ = kill_process(self.pid(), Signal::TERM);
        let deadline = Instant::now() + Duration::from_secs(3);
        while Instant::now() < deadline && matches!(self.child.try_wait(), Ok(None)) {
            std::thread::sleep(Duration::from_millis(5));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Server {
    pub(super) fn wrun(guest: &str, workers: u32, args: &[&str]) -> Self {
        let mut command = Command::new(WRUN);
        command.args(["cluster", guest, "--listen", "0", "-w", &workers.to_string()]);
        command.args(["--cache-dir", cache_dir().to_str().unwrap()]).args(args).stderr(Stdio::null());
        Self::that_says_where(command).unwrap()
    }

    /// As [`Server::wrun`], with what it tells.
    pub(super) fn wrun_that_tells(guest: &str, workers: u32) -> (Self, BufReader<ChildStderr>) {
        let mut command = Command::new(WRUN);
        command.args(["cluster", guest, "--listen", "0", "-w", &workers.to_string()]);
        command.args(["--cache-dir", cache_dir().to_str().unwrap()]).stderr(Stdio::piped());
        let mut server = Self::that_says_where(command).unwrap();
        let stderr = BufReader::new(server.child.stderr.take().unwrap());
        (server, stderr)
    }

    /// A folder whose guests are live.
    pub(super) fn watch(folder: &Path, args: &[&str]) -> Self {
        let mut command = Command::new(WRUN);
        command.arg("watch").arg(folder).args(["--listen", "0", "--cache-dir", cache_dir().to_str().unwrap()]);
        command.args(args).stderr(Stdio::null());
        Self::that_says_where(command).unwrap()
    }

    /// This program, as a bare hyper.
    pub(super) fn hyper(threads: u32) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args([HYPER_ARG, &threads.to_string()]);
        Self::that_says_where(command).unwrap()
    }

    /// Node's cluster, when it is installed.
    pub(super) fn node(workers: u32) -> Option<Self> {
        let mut command = Command::new("node");
        command.args(["-e", NODE, &workers.to_string()]);
        Self::that_says_where(command)
    }

    /// `wasmtime serve`, when it is installed.
    pub(super) fn wasmtime(guest: &str, args: &[&str]) -> Option<Self> {
        let wasmtime = std::env::var("WASMTIME").unwrap_or_else(|_| "wasmtime".into());
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let child = Command::new(wasmtime)
            .args(["serve", "-Scli", "--addr", &address.to_string()])
            .args(args)
            .arg(guest)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .ok()?;
        let server = Self { child, address };
        let deadline = Instant::now() + Duration::from_secs(20);
        while TcpStream::connect(address).is_err() {
            if Instant::now() > deadline {
                return None;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Some(server)
    }

    /// A server whose first line ends with its address.
    fn that_says_where(mut command: Command) -> Option<Self> {
        let mut child = command.env_remove("RUST_BACKTRACE").stdout(Stdio::piped()).spawn().ok()?;
        let mut line = String::new();
        BufReader::new(child.stdout.take()?).read_line(&mut line).ok()?;
        let address = line.trim().rsplit(['/', ' ']).next()?.parse().ok()?;
        Some(Self { child, address })
    }

    pub(super) fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// The processes that it has started.
    pub(super) fn workers(&self) -> Vec<Pid> {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.pid().as_raw_pid())).unwrap().flatten();
        let lists = tasks.filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
        let pids = lists.flat_map(|list| list.split_whitespace().map(str::to_owned).collect::<Vec<_>>());
        pids.filter_map(|pid| Pid::from_raw(pid.parse().ok()?)).collect()
    }

    /// The memory of its workers, or of itself when it has none, each in MiB (PSS).
    pub(super) fn memory(&self) -> f64 {
        let workers = self.workers();
        let pids = if workers.is_empty() { vec![self.pid()] } else { workers };
        let each = pids.iter().map(|pid| {
            let rollup = fs::read_to_string(format!("/proc/{}/smaps_rollup", pid.as_raw_pid())).unwrap_or_default();
            let pss = rollup.lines().find_map(|line| line.strip_prefix("Pss:")?.trim().strip_suffix(" kB"));
            pss.and_then(|pss| pss.trim().parse::<f64>().ok()).unwrap_or(0.0) / 1024.0
        });
        each.sum::<f64>() / f64::from(u32::try_from(pids.len()).unwrap())
    }
}

/// The example of Node's documentation, with the answer of `hello-http`; a `POST` gets its body back.
const NODE: &str = r#"
const cluster = require("cluster"), http = require("http");
if (cluster.isPrimary) {
  for (let i = 0; i < +process.argv[1]; i++) cluster.fork();
  cluster.on("exit", () => cluster.fork());
  let told = false;
  cluster.on("listening", (_, at) => { if (!told) console.log(`127.0.0.1:${at.port}`); told = true; });
  process.on("SIGTERM", () => process.exit());
} else {
  http.createServer((request, response) => {
    const answer = body => {
      response.writeHead(200, { "content-type": "application/json", "content-length": body.length });
      response.end(body);
    };
    if (request.method === "GET") {
      return answer(JSON.stringify({ pid: process.pid, worker: cluster.worker.id, generation: 1 }));
    }
    const parts = [];
    request.on("data", part => parts.push(part));
    request.on("end", () => answer(JSON.stringify(JSON.parse(Buffer.concat(parts)))));
  }).listen(0, "127.0.0.1");
}
"#;

/// How many threads this process is to serve on, if it is [`Server::hyper`].
pub(crate) fn hyper_threads() -> Option<u32> {
    let mut args = std::env::args().skip(1);
    args.next().filter(|arg| arg == HYPER_ARG)?;
    args.next()?.parse().ok()
}

/// A bare hyper: a runtime for each thread, one listener, the answer of `hello-http`.
pub(crate) fn hyper(threads: u32) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    println!("{}", listener.local_addr().unwrap());
    let threads: Vec<_> = (0..threads)
        .map(|_| {
            let listener = listener.try_clone().unwrap();
            std::thread::spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                runtime.block_on(accept(listener));
            })
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
}

async fn accept(listener: TcpListener) {
    let listener = tokio::net::TcpListener::from_std(listener).unwrap();
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        let _ = stream.set_nodelay(true);
        tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), service_fn(answer)));
        // or the first to wake takes all that are there
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

async fn answer(request: Request<Incoming>) -> Result<Response<Full<bytes::Bytes>>, Infallible> {
    let body = if request.method() == Method::GET {
        bytes::Bytes::from_static(b"{\"pid\":4711,\"worker\":1,\"generation\":1}")
    } else {
        request.into_body().collect().await.map(http_body_util::Collected::to_bytes).unwrap_or_default()
    };
    Ok(Response::builder().header("content-type", "application/json").body(Full::new(body)).unwrap())
}
