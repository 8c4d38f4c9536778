//! wrun's handler guests. Each file beside this one is a guest of its own: an example of this package, built as a
//! `cdylib`.
