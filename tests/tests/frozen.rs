//! Vaults of earlier versions are read for ever after. `bin/freeze.rs` made them.

use reseal_tests::frozen::Frozen;

#[test]
fn the_vault_of_version_1_holds_what_was_backed_up() {
    let thawed = Frozen::copy("v1").thaw();
    assert_eq!(thawed.content(), thawed.expected);
}

#[test]
fn the_vault_of_version_1_verifies() {
    let thawed = Frozen::copy("v1").thaw();
    let report = thawed.verify();
    assert_eq!(report.damaged, []);
    assert_eq!(report.points, thawed.expected.points.len() as u64);
}
