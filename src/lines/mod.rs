//! JSON lines: read and written on threads of their own, so that a slow reader or writer stops the work and not those who
//! watch over it.

mod input;
mod output;

pub(crate) use self::{
    input::{BATCHES, Line, read_lines},
    output::Writer,
};
