//! A load: so many keep-alive connections, each with one request under way, on one thread.

use std::{
    cell::RefCell,
    collections::BTreeMap,
    io,
    net::SocketAddr,
    rc::Rc,
    time::{Duration, Instant},
};

use memchr::memmem;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

/// How long a patient client waits before it calls a request hung.
const PATIENCE: Duration = Duration::from_secs(5);

/// What to send, how, and for how long.
#[derive(Clone)]
pub(super) struct Load {
    pub(super) address: SocketAddr,
    pub(super) connections: usize,
    pub(super) time: Duration,
    pub(super) request: Rc<[u8]>,
    /// What each client sends instead, in turn; none = they all send the same.
    pub(super) each: Rc<[Rc<[u8]>]>,
    /// Whether each request is watched for being hung, which costs a timer.
    pub(super) is_patient: bool,
}

/// What came of it.
#[derive(Default)]
pub(super) struct Figures {
    pub(super) per_second: f64,
    pub(super) p50_us: f64,
    pub(super) p99_us: f64,
    pub(super) failed: usize,
    pub(super) hung: usize,
    /// Answers by the worker that they name.
    pub(super) by_worker: BTreeMap<u64, usize>,
    /// When each process that an answer named was first heard of.
    pub(super) first_heard: BTreeMap<u64, Instant>,
}

#[derive(Default)]
struct Record {
    took_us: Vec<u32>,
    figures: Figures,
}

impl Load {
    pub(super) fn get(address: SocketAddr) -> Self {
        Self {
            address,
            connections: 64,
            time: Duration::from_secs(2),
            request: b"GET / HTTP/1.1\r\nHost: bench\r\n\r\n".as_slice().into(),
            each: [].into(),
            is_patient: false,
        }
    }

    pub(super) fn post(address: SocketAddr, body: &str) -> Self {
        let length = body.len();
        let request = format!("POST / HTTP/1.1\r\nHost: bench\r\nContent-Length: {length}\r\n\r\n{body}");
        Self { request: request.into_bytes().into(), ..Self::get(address) }
    }

    /// As many clients for each of so many apps.
    pub(super) fn spread_over(self, apps: usize) -> Self {
        let request = |app| format!("GET /app{app} HTTP/1.1\r\nHost: bench\r\n\r\n").into_bytes().into();
        Self { each: (0..apps).map(request).collect(), ..self }
    }

    /// Sends it, and does something else meanwhile.
    pub(super) fn run_with(&self, meanwhile: impl FnOnce() + Send + 'static) -> Figures {
        let beside = std::thread::spawn(meanwhile);
        let figures = self.run();
        beside.join().unwrap();
        figures
    }

    pub(super) fn run(&self) -> Figures {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let record = Rc::<RefCell<Record>>::default();
        let start = Instant::now();
        tokio::task::LocalSet::new().block_on(&runtime, async {
            let mut clients = tokio::task::JoinSet::new();
            for at in 0..self.connections {
                let request = self.each.get(at % self.each.len().max(1)).unwrap_or(&self.request).clone();
                let load = Self { request, ..self.clone() };
                clients.spawn_local(client(load, start + self.time, record.clone()));
            }
            if self.is_patient {
                clients.spawn_local(strangers(self.clone(), start + self.time, record.clone()));
            }
            clients.join_all().await;
        });
        let took = start.elapsed().as_secs_f64();
        let Record { mut took_us, mut figures } = Rc::try_unwrap(record).ok().unwrap().into_inner();
        took_us.sort_unstable();
        let count = took_us.len();
        let at = |share: usize| f64::from(took_us.get(count * share / 100).copied().unwrap_or(0));
        (figures.p50_us, figures.p99_us) = (at(50), at(99));
        figures.per_second = f64::from(u32::try_from(count).unwrap()) / took;
        figures
    }
}

async fn client(load: Load, until: Instant, record: Rc<RefCell<Record>>) {
    let mut buffer = Vec::with_capacity(16 << 10);
    while Instant::now() < until {
        let Some(mut stream) = connect(&load, &record).await else {
            tokio::time::sleep(Duration::from_millis(1)).await;
            continue;
        };
        while Instant::now() < until && once(&load, &mut stream, &mut buffer, &record).await {}
    }
}

/// A new connection every few milliseconds: a worker that has just begun is met as soon as it accepts.
async fn strangers(load: Load, until: Instant, record: Rc<RefCell<Record>>) {
    let mut there = tokio::task::JoinSet::new();
    while Instant::now() < until {
        let (load, record) = (load.clone(), record.clone());
        there.spawn_local(async move {
            if let Some(mut stream) = connect(&load, &record).await {
                once(&load, &mut stream, &mut vec![], &record).await;
            }
        });
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    there.join_all().await;
}

async fn connect(load: &Load, record: &RefCell<Record>) -> Option<TcpStream> {
    let stream = TcpStream::connect(load.address).await.and_then(|stream| stream.set_nodelay(true).map(|()| stream));
    if stream.is_err() {
        record.borrow_mut().figures.failed += 1;
    }
    stream.ok()
}

/// One request, noted; whether its connection lives on.
async fn once(load: &Load, stream: &mut TcpStream, buffer: &mut Vec<u8>, record: &RefCell<Record>) -> bool {
    let begun = Instant::now();
    let asked = ask(stream, &load.request, buffer);
    let result =
        if load.is_patient { tokio::time::timeout(PATIENCE, asked).await.map_err(|_| ()) } else { Ok(asked.await) };
    let record = &mut *record.borrow_mut();
    match result {
        Err(()) => record.figures.hung += 1,
        Ok(Err(_)) => record.figures.failed += 1,
        Ok(Ok(is_last)) => {
            record.took_us.push(u32::try_from(begun.elapsed().as_micros()).unwrap_or(u32::MAX));
            if let Some(worker) = number(buffer, b"\"worker\":") {
                *record.figures.by_worker.entry(worker).or_default() += 1;
            }
            if let Some(pid) = number(buffer, b"\"pid\":").filter(|_| load.is_patient) {
                record.figures.first_heard.entry(pid).or_insert_with(Instant::now);
            }
            return !is_last;
        }
    }
    false
}

/// Sends a request and reads its response; whether it was the connection's last.
async fn ask(stream: &mut TcpStream, request: &[u8], buffer: &mut Vec<u8>) -> io::Result<bool> {
    stream.write_all(request).await?;
    buffer.clear();
    let mut end = None;
    loop {
        if stream.read_buf(buffer).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if end.is_none()
            && let Some(head) = memmem::find(buffer, b"\r\n\r\n").map(|at| at + 4)
        {
            assert!(buffer.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(buffer));
            end = Some((head, length(&buffer[..head])));
        }
        match end {
            Some((head, Some(length))) if buffer.len() >= head + length => break,
            Some((_, None)) if buffer.ends_with(b"0\r\n\r\n") => break,
            _ => {}
        }
    }
    let (head, _) = end.unwrap();
    Ok(memmem::find(&buffer[..head], b"onnection: close").is_some())
}

/// A response's length; none when it comes in chunks.
fn length(head: &[u8]) -> Option<usize> {
    let length = number(head, b"ontent-length: ").or_else(|| number(head, b"ontent-Length: "))?;
    usize::try_from(length).ok()
}

/// The number after a text.
fn number(bytes: &[u8], after: &[u8]) -> Option<u64> {
    let rest = &bytes[memmem::find(bytes, after)? + after.len()..];
    let digits = rest.iter().take_while(|byte| byte.is_ascii_digit());
    Some(digits.fold(0, |number, digit| number * 10 + u64::from(digit - b'0')))
}
