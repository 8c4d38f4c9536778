//! Does with the network what its arguments tell it to.

use std::io::{self, BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream, ToSocketAddrs, UdpSocket};
use std::process::ExitCode;
use std::{env, iter};

const USAGE: &str = "\
usage: net ACT...

  connect ADDRESS          connects, sends the line `hello` and prints the line that comes back
  connect-to NAME ADDRESS  looks a name up, connects to the address, and does the same
  lookup NAME              prints where a name leads, sorted
  hold ADDRESS TIMES       connects so many times at once, and prints how many
  bind                     gives a socket a port of its own, and no more
  listen                   listens on any port
  udp                      makes a socket for datagrams

Several acts are done one after the other, each with its own result on stdout or stderr.";

fn main() -> ExitCode {
    let args: Vec<_> = env::args().skip(1).collect();
    let mut rest: Vec<_> = args.iter().map(String::as_str).collect();
    let mut code = ExitCode::SUCCESS;
    while !rest.is_empty() {
        let (done, used) = match *rest {
            ["connect", address, ..] => (connect(address), 2),
            ["connect-to", name, address, ..] => (lookup(name).and_then(|_| connect(address)), 3),
            ["lookup", name, ..] => (lookup(name), 2),
            ["hold", address, times, ..] => (hold(address, times.parse().unwrap_or(0)), 3),
            ["bind", ..] => (bind(), 1),
            ["listen", ..] => (TcpListener::bind("0.0.0.0:0").map(|_| "listening".to_owned()), 1),
            ["udp", ..] => (UdpSocket::bind("0.0.0.0:0").map(|_| "bound".to_owned()), 1),
            _ => {
                eprintln!("{USAGE}");
                return ExitCode::from(2);
            }
        };
        match done {
            Ok(line) => println!("{line}"),
            Err(error) => {
                // in one piece: others may write there, too
                let _ = io::stderr().write_all(format!("{}\n", reason(&error)).as_bytes());
                code = ExitCode::FAILURE;
            }
        }
        rest.drain(..used);
    }
    code
}

/// What std has no kind for has a text.
fn reason(error: &io::Error) -> String {
    match error.kind().to_string() {
        kind if kind == "uncategorized error" => error.to_string(),
        kind => kind,
    }
}

fn connect(address: &str) -> io::Result<String> {
    let mut stream = TcpStream::connect(address)?;
    stream.write_all(b"hello\n")?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line)?;
    Ok(line.trim_end().to_owned())
}

fn lookup(name: &str) -> io::Result<String> {
    let mut found: Vec<_> = (name, 0).to_socket_addrs()?.map(|address| address.ip().to_string()).collect();
    found.sort();
    Ok(found.join(" "))
}

#[cfg(target_env = "p2")]
fn bind() -> io::Result<String> {
    use wasip2::sockets::network::{ErrorCode, IpAddressFamily, IpSocketAddress, Ipv4SocketAddress};
    use wasip2::sockets::{instance_network::instance_network, tcp_create_socket::create_tcp_socket};

    let failed = |code| match code {
        ErrorCode::AccessDenied => io::ErrorKind::PermissionDenied.into(),
        code => io::Error::other(code.to_string()),
    };
    let socket = create_tcp_socket(IpAddressFamily::Ipv4).map_err(failed)?;
    let any = IpSocketAddress::Ipv4(Ipv4SocketAddress { port: 0, address: (0, 0, 0, 0) });
    socket.start_bind(&instance_network(), any).and_then(|()| socket.finish_bind()).map_err(failed)?;
    Ok("bound".to_owned())
}

#[cfg(not(target_env = "p2"))]
fn bind() -> io::Result<String> {
    Err(io::ErrorKind::Unsupported.into())
}

fn hold(address: &str, times: usize) -> io::Result<String> {
    let all = iter::repeat_with(|| TcpStream::connect(address)).take(times).collect::<io::Result<Vec<_>>>()?;
    Ok(all.len().to_string())
}
