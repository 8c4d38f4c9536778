//! `wrun:guest/window`: ranges of buffers in a guest's memory.

use wasmtime::{
    StoreContextMut,
    component::{Linker, WasmList},
};

use crate::sandbox::{
    host::bindings::wrun::guest::window::WindowError,
    instance::State,
    window::{attach, list},
};

/// Links it by hand: bindings would copy the region that a guest hands over.
pub(in crate::sandbox) fn link(linker: &mut Linker<State>) -> wasmtime::Result<()> {
    let mut window = linker.instance("wrun:guest/window@0.1.0")?;
    window
        .func_wrap("buffers", |store: StoreContextMut<'_, State>, (): ()| Ok((list(&store.data().setup.buffers),)))?;
    window.func_wrap(
        "attach",
        |store: StoreContextMut<'_, State>, (name, offset, region): (String, u64, WasmList<u8>)| {
            Ok((attach(store, &name, offset, &region),))
        },
    )?;
    window.func_wrap("detach", |mut store: StoreContextMut<'_, State>, (number,): (u32,)| {
        let detached: Result<(), WindowError> = store.data_mut().windows.detach(number);
        Ok((detached,))
    })?;
    window.func_wrap("windows", |store: StoreContextMut<'_, State>, (): ()| Ok((store.data().windows.list(),)))
}
