//! `wasi:sockets`: the engine's own, but for what it leaves open. A guest has so many sockets, binds none, and looks up
//! granted names only, which somebody else does for it.

use std::{
    future::Future,
    net::IpAddr,
    pin::pin,
    sync::Arc,
    task::{Context, Poll, Waker},
    vec,
};

use wasmtime::{
    StoreContextMut,
    component::{Linker, Resource, ResourceTable, ResourceType},
};
use wasmtime_wasi::{
    WasiView,
    p2::{
        DynPollable, Network as NetworkHandle, Pollable, TcpSocket,
        bindings::sockets::{
            network::{ErrorCode, IpAddress, IpAddressFamily, IpSocketAddress},
            tcp_create_socket::Host as _,
        },
        subscribe,
    },
    runtime::{AbortOnDropJoinHandle, spawn},
    sockets::WasiSocketsView as _,
};

use super::Network;
use crate::{grant::Target, sandbox::instance::State};

/// How many TCP sockets, and how many connections for requests, one instance may have open.
pub(crate) const SOCKETS_MAX: usize = 32;

/// The TCP sockets that an instance has, by their numbers in its table.
#[derive(Default)]
pub(in crate::sandbox) struct Sockets(Vec<u32>);

impl Sockets {
    /// Whether there may be another one. Those that are gone are forgotten.
    fn has_room(&mut self, table: &ResourceTable) -> bool {
        self.0.retain(|rep| table.get(&Resource::<TcpSocket>::new_borrow(*rep)).is_ok());
        self.0.len() < SOCKETS_MAX
    }

    fn note(&mut self, socket: &Resource<TcpSocket>) {
        // its number may have been another's
        self.0.retain(|rep| *rep != socket.rep());
        self.0.push(socket.rep());
    }
}

/// Takes the place of some functions that the engine's WASI has linked.
pub(in crate::sandbox) fn link(linker: &mut Linker<State>) -> wasmtime::Result<()> {
    linker.allow_shadowing(true);
    // of the version that is linked: both come from the same crate
    let mut create = linker.instance("wasi:sockets/tcp-create-socket@0.2.12")?;
    create.func_wrap("create-tcp-socket", |mut store: StoreContextMut<'_, State>, (family,): (IpAddressFamily,)| {
        Ok((create_socket(store.data_mut(), family)?,))
    })?;
    let mut tcp = linker.instance("wasi:sockets/tcp@0.2.12")?;
    tcp.func_wrap(
        "[method]tcp-socket.start-bind",
        |_, (_, _, _): (Resource<TcpSocket>, Resource<NetworkHandle>, IpSocketAddress)| {
            Ok((Err::<(), _>(ErrorCode::AccessDenied),))
        },
    )?;
    let mut names = linker.instance("wasi:sockets/ip-name-lookup@0.2.12")?;
    names.resource("resolve-address-stream", ResourceType::host::<Lookup>(), |mut store, rep| {
        table(store.data_mut()).delete(Resource::<Lookup>::new_own(rep))?;
        Ok(())
    })?;
    names.func_wrap_async(
        "resolve-addresses",
        |mut store: StoreContextMut<'_, State>, (handle, name): (Resource<NetworkHandle>, String)| {
            Box::new(async move {
                // each is a task, which goes when the thread is given way, be it that its guest has dropped it long ago
                tokio::task::yield_now().await;
                let state = store.data_mut();
                table(state).get(&handle)?;
                let network = state.network().clone();
                Ok((match Lookup::begin(&network, &name) {
                    Ok(lookup) => Ok(table(state).push(lookup)?),
                    Err(code) => Err(code),
                },))
            })
        },
    )?;
    names.func_wrap(
        "[method]resolve-address-stream.resolve-next-address",
        |mut store: StoreContextMut<'_, State>, (lookup,): (Resource<Lookup>,)| {
            Ok((table(store.data_mut()).get_mut(&lookup)?.next(),))
        },
    )?;
    names.func_wrap(
        "[method]resolve-address-stream.subscribe",
        |mut store: StoreContextMut<'_, State>, (lookup,): (Resource<Lookup>,)| {
            let pollable: Resource<DynPollable> = subscribe(table(store.data_mut()), lookup)?;
            Ok((pollable,))
        },
    )?;
    linker.allow_shadowing(false);
    Ok(())
}

fn table(state: &mut State) -> &mut ResourceTable {
    state.ctx().table
}

fn create_socket(
    state: &mut State,
    family: IpAddressFamily,
) -> wasmtime::Result<Result<Resource<TcpSocket>, ErrorCode>> {
    if !state.may_create_sockets() {
        state.network().refuse_tcp();
        return Ok(Err(ErrorCode::AccessDenied));
    }
    let (sockets, table) = state.sockets_and_table();
    if !sockets.has_room(table) {
        return Ok(Err(ErrorCode::NewSocketLimit));
    }
    match state.sockets().create_tcp_socket(family) {
        Ok(socket) => {
            state.sockets_and_table().0.note(&socket);
            Ok(Ok(socket))
        }
        Err(error) => error.downcast().map(Err),
    }
}

/// A name that is being looked up, or where it leads.
enum Lookup {
    Asked(AbortOnDropJoinHandle<Vec<IpAddr>>),
    Answered(vec::IntoIter<IpAddr>),
    Nowhere,
}

impl Lookup {
    fn begin(network: &Arc<Network>, name: &str) -> Result<Self, ErrorCode> {
        match Target::parse(name).ok_or(ErrorCode::InvalidArgument)? {
            // nobody has to be asked
            Target::Address(ip) => Ok(Self::Answered(vec![ip].into_iter())),
            Target::Name(name) if network.check_lookup(&name) => {
                let network = network.clone();
                Ok(Self::Asked(spawn(async move { network.look_up(&name).await })))
            }
            Target::Name(_) => Err(ErrorCode::AccessDenied),
        }
    }

    fn answered(&mut self, found: Vec<IpAddr>) {
        *self = if found.is_empty() { Self::Nowhere } else { Self::Answered(found.into_iter()) };
    }

    fn next(&mut self) -> Result<Option<IpAddress>, ErrorCode> {
        if let Self::Asked(answer) = self
            && let Poll::Ready(found) = pin!(answer).poll(&mut Context::from_waker(Waker::noop()))
        {
            self.answered(found);
        }
        match self {
            Self::Asked(_) => Err(ErrorCode::WouldBlock),
            Self::Answered(rest) => Ok(rest.next().map(IpAddress::from)),
            Self::Nowhere => Err(ErrorCode::NameUnresolvable),
        }
    }
}

#[wasmtime_wasi::async_trait]
impl Pollable for Lookup {
    async fn ready(&mut self) {
        if let Self::Asked(answer) = self {
            let found = answer.await;
            self.answered(found);
        }
    }
}
