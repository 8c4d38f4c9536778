//! `wasi:http/outgoing-handler`: requests to granted hosts, each on a connection of its own to the very address that was
//! checked.

use std::{
    future::Future,
    io,
    net::SocketAddr,
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::{
    Method, Request, Response, Uri,
    body::{Body, Frame, Incoming, SizeHint},
    client::conn::http1,
    header::{CONNECTION, HOST, HeaderValue},
    http::uri::{Authority, PathAndQuery, Scheme},
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, Sleep, sleep, timeout},
};
use wasmtime::{
    StoreContextMut,
    component::{Linker, Resource},
};
use wasmtime_wasi::WasiView;
use wasmtime_wasi_http::{
    Error, RequestOptions, WasiBody, WasiHttpHooks, WasiHttpView,
    io::TokioIo,
    p2::{
        bindings::http::{
            outgoing_handler::Host as _,
            types::{ErrorCode, IoError, RequestOptions as WasiRequestOptions},
        },
        types::HostOutgoingRequest,
    },
};

use super::{Network, SOCKETS_MAX};
use crate::{
    grant::{Target, default_port, host_and_port},
    sandbox::instance::State,
};

/// What one write of a guest to the body of a request or a response may have; two of them may wait to be sent.
const CHUNK_MAX: usize = 256 << 10;

/// How long a connection, the head of a response, and each part of its body may take when the guest does not say.
const PATIENCE: Duration = Duration::from_mins(10);

/// What is kept of a response that nobody has read yet, its head included.
const BUFFER_MAX: usize = 64 << 10;

/// The requests of one instance.
pub(in crate::sandbox) struct Outbound {
    network: Arc<Network>,
    connections: Arc<Semaphore>,
}

impl Outbound {
    pub(in crate::sandbox) fn new(network: Arc<Network>) -> Self {
        Self { network, connections: Arc::new(Semaphore::new(SOCKETS_MAX)) }
    }
}

impl Outbound {
    /// Where a request goes to, and a place for it, when it may be made.
    fn admit(&self, request: &Request<WasiBody>) -> Result<(Destination, OwnedSemaphorePermit), Error> {
        let destination = Destination::of(request.method(), request.uri())?;
        if !self.network.check_http(&destination.target, destination.https, destination.port) {
            return Err(Error::HttpRequestDenied);
        }
        let permit = self.connections.clone().try_acquire_owned().map_err(|_| Error::ConnectionLimitReached)?;
        Ok((destination, permit))
    }
}

/// What is left to do for a response while its body is read.
type Rest = Box<dyn Future<Output = Result<(), Error>> + Send>;

type Sent = Result<(Response<WasiBody>, Rest), Error>;

impl WasiHttpHooks for Outbound {
    fn send_request(
        &mut self,
        request: Request<WasiBody>,
        options: Option<RequestOptions>,
        _: Box<dyn Future<Output = Result<(), Error>> + Send>,
    ) -> Box<dyn Future<Output = Sent> + Send> {
        // Now, and not when somebody polls: what is refused is not kept until then.
        match self.admit(&request) {
            Err(error) => Box::new(std::future::ready(Err(error))),
            Ok((destination, permit)) => {
                let network = self.network.clone();
                let sent =
                    async move { send(&network, destination, request, options.unwrap_or_default(), permit).await };
                Box::new(sent)
            }
        }
    }

    fn p2_outgoing_body_chunk_size(&mut self) -> usize {
        CHUNK_MAX
    }
}

/// Takes the place of two functions. That which names the code of an error within a body: the engine's own knows no codes
/// but those that are its guest's. And that which sends a request: each is a task, which goes when the thread is given way,
/// be it that its guest has dropped it long ago; so each gives way.
pub(in crate::sandbox) fn link(linker: &mut Linker<State>) -> wasmtime::Result<()> {
    linker.allow_shadowing(true);
    // of the version that is linked: both come from the same crate
    let mut types = linker.instance("wasi:http/types@0.2.12")?;
    types.func_wrap("http-error-code", |mut store: StoreContextMut<'_, State>, (error,): (Resource<IoError>,)| {
        let error = store.data_mut().ctx().table.get(&error)?;
        Ok((error.downcast_ref::<ErrorCode>().cloned().or_else(|| error.downcast_ref().and_then(code_of_body)),))
    })?;
    let mut handler = linker.instance("wasi:http/outgoing-handler@0.2.12")?;
    handler.func_wrap_async(
        "handle",
        |mut store: StoreContextMut<'_, State>,
         (request, options): (Resource<HostOutgoingRequest>, Option<Resource<WasiRequestOptions>>)| {
            Box::new(async move {
                tokio::task::yield_now().await;
                let number = options.as_ref().map(Resource::rep);
                let sent = store.data_mut().http().handle(request, options);
                // the engine leaves them in the table, which a guest that lives long would fill with them
                if let Some(number) = number {
                    let options = Resource::<WasiRequestOptions>::new_own(number);
                    store.data_mut().ctx().table.delete(options)?;
                }
                Ok((match sent {
                    Ok(response) => Ok(response),
                    Err(error) => Err(error.downcast()?),
                },))
            })
        },
    )?;
    linker.allow_shadowing(false);
    Ok(())
}

/// The code of what ends a body too early.
fn code_of_body(error: &Error) -> Option<ErrorCode> {
    Some(match error {
        Error::ConnectionReadTimeout => ErrorCode::ConnectionReadTimeout,
        Error::ConnectionTerminated => ErrorCode::ConnectionTerminated,
        Error::HttpProtocolError => ErrorCode::HttpProtocolError,
        Error::HttpRequestBodySize(size) => ErrorCode::HttpRequestBodySize(*size),
        Error::HttpResponseIncomplete => ErrorCode::HttpResponseIncomplete,
        _ => return None,
    })
}

/// Where a request goes to.
struct Destination {
    target: Target,
    https: bool,
    port: u16,
}

impl Destination {
    /// Reads it where it can be read in one way only.
    fn of(method: &Method, uri: &Uri) -> Result<Self, Error> {
        if method == Method::CONNECT {
            return Err(Error::HttpRequestMethodInvalid);
        }
        let https = uri.scheme() == Some(&Scheme::HTTPS);
        if !https && uri.scheme() != Some(&Scheme::HTTP) {
            return Err(Error::HttpRequestUriInvalid);
        }
        uri.authority().and_then(|authority| Self::read(authority, https)).ok_or(Error::HttpRequestUriInvalid)
    }

    fn read(authority: &Authority, https: bool) -> Option<Self> {
        let target = Target::parse(authority.host())?;
        let port = match authority.as_str().strip_prefix(authority.host())? {
            "" => default_port(https),
            rest => rest.strip_prefix(':')?.parse().ok().filter(|port| *port > 0)?,
        };
        // with a name and a password in front it would not be what it begins with
        (!authority.as_str().contains('@')).then_some(Self { target, https, port })
    }

    /// The header that says the same.
    fn host_header(&self) -> String {
        let port = Some(self.port).filter(|port| *port != default_port(self.https));
        match (&self.target, port) {
            // brackets also without a port
            (Target::Address(ip), None) if ip.is_ipv6() => format!("[{ip}]"),
            (target, port) => host_and_port(target, port),
        }
    }

    /// The addresses that it may go to.
    async fn addresses(&self, network: &Network) -> Result<Vec<SocketAddr>, Error> {
        let name = match &self.target {
            // it was checked
            Target::Address(ip) => return Ok(vec![SocketAddr::new(*ip, self.port)]),
            Target::Name(name) => name,
        };
        let found = network.look_up(name).await;
        if found.is_empty() {
            return Err(Error::DnsError { rcode: Some("address not available".into()), info_code: None });
        }
        match network.allowed_of(name, &found, self.https, self.port) {
            allowed if allowed.is_empty() => Err(Error::DestinationIpProhibited),
            allowed => Ok(allowed.into_iter().map(|ip| SocketAddr::new(ip, self.port)).collect()),
        }
    }

    /// Connects to the first of its addresses that lets us.
    async fn connect(&self, network: &Network) -> Result<TcpStream, Error> {
        let mut last = Error::DestinationUnavailable;
        for address in self.addresses(network).await? {
            match TcpStream::connect(address).await {
                Ok(stream) => {
                    // a head and a body that are written one after the other wait for nobody
                    let _ = stream.set_nodelay(true);
                    return Ok(stream);
                }
                Err(error) => last = code_of_connect(&error),
            }
        }
        Err(last)
    }
}

async fn send(
    network: &Network,
    destination: Destination,
    mut request: Request<WasiBody>,
    options: RequestOptions,
    permit: OwnedSemaphorePermit,
) -> Sent {
    let path = request.uri().path_and_query().cloned().unwrap_or(PathAndQuery::from_static("/"));
    // what is not for a proxy has no more than the path in it
    *request.uri_mut() = path.into();
    let host = HeaderValue::try_from(destination.host_header()).map_err(|_| Error::HttpRequestUriInvalid)?;
    request.headers_mut().insert(HOST, host);
    request.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));

    let begun = Instant::now();
    let within = options.connect_timeout.unwrap_or(PATIENCE);
    let out_of_time = |_| Error::ConnectionTimeout;
    let stream = timeout(within, destination.connect(network)).await.map_err(out_of_time)??;
    if !destination.https {
        return exchange(stream, request, options, permit).await;
    }
    let tls = network.tls().ok_or(Error::ConfigurationError)?;
    let left = within.saturating_sub(begun.elapsed());
    let secured = timeout(left, tls.connect(&destination.target, stream)).await.map_err(out_of_time)??;
    exchange(secured, request, options, permit).await
}

/// Sends the request over a connection, and waits for the head of the response.
async fn exchange<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
    stream: S,
    request: Request<WasiBody>,
    options: RequestOptions,
    permit: OwnedSemaphorePermit,
) -> Sent {
    let mut client = http1::Builder::new();
    client.max_buf_size(BUFFER_MAX);
    let (mut sender, connection) = client.handshake(TokioIo::new(stream)).await.map_err(|error| code_of(&error))?;
    let mut connection = Some(Box::pin(connection));
    let first_byte = options.first_byte_timeout.unwrap_or(PATIENCE);
    let mut response = pin!(timeout(first_byte, sender.send_request(request)));
    let response = loop {
        let Some(moving) = &mut connection else { break response.await };
        tokio::select! {
            biased;
            response = &mut response => break response,
            ended = moving => {
                ended.map_err(|error| code_of(&error))?;
                connection = None;
            }
        }
    };
    let response = response.map_err(|_| Error::ConnectionReadTimeout)?.map_err(|error| code_of(&error))?;
    let between = options.between_bytes_timeout.unwrap_or(PATIENCE);
    // its place is taken as long as there is a connection, or something of it that nobody has read
    let permit = Arc::new(permit);
    let theirs = permit.clone();
    let body =
        |incoming| TimedBody { incoming, between, silent: Box::pin(sleep(between)), waits: true, _permit: theirs };
    let rest = async move {
        // how that ends is seen in the body
        if let Some(connection) = connection {
            let _ = connection.await;
        }
        drop(permit);
        Ok(())
    };
    Ok((response.map(|incoming| body(incoming).boxed_unsync()), Box::new(rest)))
}

/// The body of a response, which must not be silent for too long.
struct TimedBody {
    incoming: Incoming,
    between: Duration,
    silent: Pin<Box<Sleep>>,
    /// Whether somebody waits, and the clock runs.
    waits: bool,
    _permit: Arc<OwnedSemaphorePermit>,
}

impl Body for TimedBody {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        match Pin::new(&mut self.incoming).poll_frame(cx) {
            Poll::Ready(frame) => {
                self.waits = false;
                Poll::Ready(frame.map(|frame| frame.map_err(|error| code_of(&error))))
            }
            Poll::Pending => {
                if !std::mem::replace(&mut self.waits, true) {
                    let until = Instant::now() + self.between;
                    self.silent.as_mut().reset(until);
                }
                ready!(self.silent.as_mut().poll(cx));
                Poll::Ready(Some(Err(Error::ConnectionReadTimeout)))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.incoming.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.incoming.size_hint()
    }
}

fn code_of_connect(error: &io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => Error::ConnectionRefused,
        io::ErrorKind::TimedOut => Error::ConnectionTimeout,
        io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable => Error::DestinationIpUnroutable,
        _ => Error::DestinationUnavailable,
    }
}

fn code_of(error: &hyper::Error) -> Error {
    let source = std::error::Error::source(error);
    // the guest's own body is at fault
    if let Some(Error::HttpRequestBodySize(size)) = source.and_then(|source| source.downcast_ref()) {
        return Error::HttpRequestBodySize(*size);
    }
    // of a head, or of a body
    let is_cut = source
        .and_then(|source| source.downcast_ref::<io::Error>())
        .is_some_and(|source| source.kind() == io::ErrorKind::UnexpectedEof);
    if error.is_incomplete_message() || is_cut {
        Error::HttpResponseIncomplete
    } else if error.is_parse_too_large() {
        Error::HttpResponseHeaderSectionSize(None)
    } else if error.is_parse() {
        Error::HttpProtocolError
    } else {
        Error::ConnectionTerminated
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(uri: &str) -> Option<(String, bool, u16)> {
        let destination = Destination::of(&Method::GET, &uri.parse().ok()?).ok()?;
        Some((destination.host_header(), destination.https, destination.port))
    }

    #[test]
    fn a_destination_can_be_read_in_one_way_only() {
        for (uri, host, https, port) in [
            ("http://Example.org./x", "example.org", false, 80),
            ("https://example.org", "example.org", true, 443),
            ("https://example.org:443", "example.org", true, 443),
            ("http://example.org:443/", "example.org:443", false, 443),
            ("http://127.0.0.1:8080/", "127.0.0.1:8080", false, 8080),
            ("http://[::1]/", "[::1]", false, 80),
            ("http://[::1]:81/", "[::1]:81", false, 81),
            ("http://[::ffff:127.0.0.1]:81/", "127.0.0.1:81", false, 81),
        ] {
            assert_eq!(read(uri), Some((host.to_owned(), https, port)), "{uri}");
        }
        for uri in [
            "http://granted.example@127.0.0.1/",
            "http://granted.example:80@127.0.0.1/",
            "http://a:b@granted.example/",
            "http://@granted.example/",
            "http://granted.example:/",
            "http://granted.example:0/",
            "http://granted.example:65536/",
            "http://granted.example:80:81/",
            "http://127.1/",
            "http://2130706433/",
            "http://0x7f000001/",
            "http://0177.0.0.1/",
            "http://[::1%25eth0]/",
            "http://::1/",
            "ftp://granted.example/",
            "granted.example:80",
            "/path",
        ] {
            assert_eq!(read(uri), None, "{uri}");
        }
        assert!(Destination::of(&Method::CONNECT, &"http://a.example".parse().expect("a URI")).is_err());
    }
}
