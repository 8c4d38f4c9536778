//! An HTTP/1.1 client on a bare socket: it sends what a test wants to send, right or wrong, and reads what comes.
//!
//! ```ignore
//! let server = Server::start(wrun(["cluster", HELLO_HTTP, "--listen", "0"]));
//! let mut client = server.connect();
//! client.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n");
//! assert_eq!(client.response().status, 200);
//! ```
//!
//! Every read ends at [`PATIENCE`].

use std::{
    io::{self, Read, Write},
    net::{Shutdown, SocketAddr, TcpStream},
    ops::{Deref, DerefMut},
    thread,
    time::Duration,
};

use serde_json::Value;

use crate::wrun::{Running, Wrun};

/// How long a client waits for the next byte: far more than any server needs.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// A `wrun` that listens.
pub(crate) struct Server {
    pub(crate) running: Running,
    pub(crate) address: SocketAddr,
}

impl Server {
    /// Starts it, and waits for the line that says where it listens.
    #[track_caller]
    pub(crate) fn start(wrun: Wrun) -> Self {
        let mut running = wrun.spawn();
        let line = running.stdout_line();
        let address = line.strip_prefix("listening on http://").unwrap_or_else(|| panic!("expected where: {line}"));
        Self { address: address.parse().expect("an address"), running }
    }

    #[track_caller]
    pub(crate) fn connect(&self) -> Client {
        Client::connect(self.address)
    }

    /// One `GET` on a connection of its own.
    #[track_caller]
    pub(crate) fn get(&self, path: &str) -> Response {
        self.request(format!("GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"))
    }

    /// One `POST` of a body on a connection of its own.
    #[track_caller]
    pub(crate) fn post(&self, path: &str, body: impl AsRef<[u8]>) -> Response {
        let body = body.as_ref();
        let head =
            format!("POST {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: {}\r\n\r\n", body.len());
        self.request([head.as_bytes(), body].concat())
    }

    /// Whatever this is, on a connection of its own, and the response to it.
    #[track_caller]
    pub(crate) fn request(&self, bytes: impl AsRef<[u8]>) -> Response {
        let mut client = self.connect();
        client.send(bytes);
        client.response()
    }
}

impl Deref for Server {
    type Target = Running;

    fn deref(&self) -> &Running {
        &self.running
    }
}

impl DerefMut for Server {
    fn deref_mut(&mut self) -> &mut Running {
        &mut self.running
    }
}

/// One connection.
pub(crate) struct Client {
    pub(crate) stream: TcpStream,
    buffer: Vec<u8>,
    /// Whether the next response is to a `HEAD`: then it has no body.
    is_head: bool,
}

/// A response that came whole.
#[derive(Debug, Clone, Default)]
pub(crate) struct Response {
    pub(crate) status: u16,
    /// Names in lower case, in the order in which they came.
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
    /// The sizes of its chunks, when it came in chunks.
    pub(crate) chunks: Vec<usize>,
    pub(crate) trailers: Vec<(String, String)>,
}

impl Response {
    /// A header's value; the first one, when there are several.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(header, _)| header == name).map(|(_, value)| &**value)
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

impl Client {
    #[track_caller]
    pub(crate) fn connect(address: SocketAddr) -> Self {
        Self::try_connect(address).expect("it listens")
    }

    /// As [`Client::connect`], where perhaps nobody listens any more.
    pub(crate) fn try_connect(address: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect_timeout(&address, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_nodelay(true)?;
        Ok(Self { stream, buffer: vec![], is_head: false })
    }

    /// Sends bytes. That the server has closed meanwhile shows when the client reads.
    pub(crate) fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.is_head = bytes.as_ref().starts_with(b"HEAD ");
        let _ = self.stream.write_all(bytes.as_ref());
    }

    /// Sends a `GET` that lets the connection live.
    pub(crate) fn send_get(&mut self, path: &str) {
        self.send(format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n"));
    }

    /// The next response; interim ones (100) are responses, too.
    #[track_caller]
    pub(crate) fn response(&mut self) -> Response {
        self.try_response().unwrap_or_else(|error| panic!("expected a response: {error}"))
    }

    /// The next response, or why there is none: `UnexpectedEof` when it ends before its end.
    pub(crate) fn try_response(&mut self) -> io::Result<Response> {
        let (status, headers) = self.head()?;
        let mut response = Response { status, headers, ..Response::default() };
        if std::mem::take(&mut self.is_head) || status < 200 || status == 204 || status == 304 {
            return Ok(response);
        }
        if response.header("transfer-encoding") == Some("chunked") {
            loop {
                let line = self.line()?;
                let size = usize::from_str_radix(line.split(';').next().unwrap_or_default(), 16)
                    .map_err(|error| io::Error::other(format!("{error}: chunk size {line:?}")))?;
                if size == 0 {
                    break;
                }
                let chunk = self.exact(size)?;
                response.body.extend(chunk);
                response.chunks.push(size);
                self.exact(2)?;
            }
            response.trailers = self.fields()?;
        } else if let Some(length) = response.header("content-length") {
            let length = length.parse().map_err(|_| io::Error::other(format!("content-length {length:?}")))?;
            response.body = self.exact(length)?;
        } else {
            self.stream.read_to_end(&mut self.buffer)?;
            response.body = std::mem::take(&mut self.buffer);
        }
        Ok(response)
    }

    /// All responses that come until the server closes the connection. A reset counts for a close.
    #[track_caller]
    pub(crate) fn responses(&mut self) -> Vec<Response> {
        match self.stream.read_to_end(&mut self.buffer) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {}
            Err(error) => panic!("expected the end of the connection: {error}"),
        }
        let mut all = vec![];
        while !self.buffer.is_empty() {
            all.push(self.response());
        }
        all
    }

    /// Takes so many bytes of what comes, some at a time and slowly, and keeps them for [`Client::response`].
    pub(crate) fn take_slowly(&mut self, length: usize, piece: usize, pause: Duration) -> io::Result<()> {
        let mut bytes = vec![0; piece];
        let end = self.buffer.len() + length;
        while self.buffer.len() < end {
            thread::sleep(pause);
            match self.stream.read(&mut bytes)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                length => self.buffer.extend_from_slice(&bytes[..length]),
            }
        }
        Ok(())
    }

    /// Ends the connection as a client does that crashes: the server is sent a reset.
    pub(crate) fn reset(self) {
        rustix::net::sockopt::set_socket_linger(&self.stream, Some(Duration::ZERO)).expect("a socket");
    }

    /// Sends nothing more; the server learns that.
    pub(crate) fn half_close(&mut self) {
        // it may have closed before
        let _ = self.stream.shutdown(Shutdown::Write);
    }

    /// Lets the kernel keep little of what the client does not read.
    pub(crate) fn keep_little(&self) {
        rustix::net::sockopt::set_socket_recv_buffer_size(&self.stream, 16 << 10).expect("a socket");
    }

    /// The head of the next response alone: its status and headers.
    pub(crate) fn head(&mut self) -> io::Result<(u16, Vec<(String, String)>)> {
        let line = self.line()?;
        let status = line.split(' ').nth(1).and_then(|status| status.parse().ok());
        let status = status.ok_or_else(|| io::Error::other(format!("status line {line:?}")))?;
        Ok((status, self.fields()?))
    }

    fn fields(&mut self) -> io::Result<Vec<(String, String)>> {
        let mut fields = vec![];
        loop {
            let line = self.line()?;
            let Some((name, value)) = line.split_once(':') else { return Ok(fields) };
            fields.push((name.to_ascii_lowercase(), value.trim().to_owned()));
        }
    }

    /// The next chunk of a response whose head was read.
    pub(crate) fn chunk(&mut self) -> io::Result<Vec<u8>> {
        let line = self.line()?;
        let size = usize::from_str_radix(&line, 16).map_err(|_| io::Error::other(format!("chunk size {line:?}")))?;
        let chunk = self.exact(size)?;
        self.exact(2)?;
        Ok(chunk)
    }

    fn line(&mut self) -> io::Result<String> {
        loop {
            if let Some(end) = self.buffer.windows(2).position(|two| two == b"\r\n") {
                let line: Vec<u8> = self.buffer.drain(..end + 2).collect();
                return Ok(String::from_utf8_lossy(&line[..end]).into_owned());
            }
            self.more()?;
        }
    }

    /// So many bytes.
    pub(crate) fn exact(&mut self, length: usize) -> io::Result<Vec<u8>> {
        while self.buffer.len() < length {
            self.more()?;
        }
        Ok(self.buffer.drain(..length).collect())
    }

    fn more(&mut self) -> io::Result<()> {
        let mut bytes = [0; 16 << 10];
        match self.stream.read(&mut bytes) {
            Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(length) => {
                self.buffer.extend_from_slice(&bytes[..length]);
                Ok(())
            }
            // a wait with a time limit is not taken up again by the kernel when the machine was paused
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Waits until the server has closed the connection; whether nothing came before that. A reset counts for a close.
    #[track_caller]
    pub(crate) fn is_closed(&mut self) -> bool {
        let mut rest = vec![];
        match self.stream.read_to_end(&mut rest) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {}
            Err(error) => panic!("expected the end of the connection: {error}"),
        }
        self.buffer.is_empty() && rest.is_empty()
    }
}
