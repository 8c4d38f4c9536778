//! Guests that work on windows of a buffer are the examples of this package, next to this file. This is what they compute.

pub mod kernel;
