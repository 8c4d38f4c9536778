//! The contract between wrun and its guests as one snapshot: what `wit/` comes to when it is resolved, without its
//! documentation. Within 0.1 it changes by addition only.
//!
//! After an addition: `INSTA_UPDATE=always cargo test --test cli contract`, and read the difference.

use wit_component::WitPrinter;
use wit_parser::Resolve;

#[test]
fn the_contract_is_as_it_was() {
    let mut resolve = Resolve::default();
    let (package, _) = resolve.push_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/wit")).unwrap();
    assert_eq!(resolve.packages.len(), 1, "the contract stands on its own");
    let mut printer = WitPrinter::default();
    printer.emit_docs(false).print(&resolve, package, &[]).unwrap();
    insta::assert_snapshot!("wrun_guest", String::from(printer.output));
}
