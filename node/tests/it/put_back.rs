//! Bugs put back on purpose, each found by the test that is there to find it.
//!
//! The test runs again in a child process that has the bug ([`martlet_node::bug`]); found means: it ran, and it failed.

use std::process::{Command, Stdio};

use martlet_node::bug::{Bug, VARIABLE};

/// The named test of this binary fails once the bug is in.
fn assert_found(bug: Bug, test: &str) {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--test-threads", "1"]).env(VARIABLE, bug.name()).stdin(Stdio::null());
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(said.contains("running 1 test"), "{test} is no test of this binary:\n{said}");
    assert!(!output.status.success() && said.contains("1 failed"), "{} is not found by {test}:\n{said}", bug.name());
}

#[test]
fn put_back_delivery_without_lease_is_found() {
    assert_found(
        Bug::DeliveryWithoutLease,
        "leases::promise_4_a_leader_that_is_cut_off_hands_out_nothing_and_the_next_one_everything_core",
    );
}

#[test]
fn put_back_a_checkpoint_without_a_redo_file_is_found() {
    assert_found(
        Bug::CheckpointWithoutRedo,
        "checkpoints::must_hold_a_crash_after_each_step_of_a_checkpoint_and_the_log_give_the_state_of_a_replica_that_did_not_crash",
    );
}

#[test]
fn put_back_an_acknowledgement_before_the_fsync_is_found() {
    assert_found(Bug::AckBeforeFsync, "log::promise_1_an_entry_is_acknowledged_only_when_a_power_cut_keeps_it");
}

#[test]
fn put_back_a_vote_that_is_not_synced_is_found() {
    assert_found(Bug::VoteNotSynced, "log::promise_1_a_vote_is_given_only_when_a_power_cut_keeps_it");
}

#[test]
fn put_back_a_log_record_whose_checksum_is_not_checked_is_found() {
    assert_found(
        Bug::ChecksumNotChecked,
        "damage::promise_5_a_bit_flipped_in_a_synced_entry_is_refused_with_its_place",
    );
}

#[test]
fn put_back_a_stored_row_whose_checksum_is_not_checked_is_found() {
    assert_found(Bug::ChecksumNotChecked, "damage::promise_5_a_bit_flipped_in_a_stored_row_is_never_read");
}

#[test]
fn put_back_a_copied_entry_that_truncates_is_found() {
    assert_found(
        Bug::CopyForwardTruncates,
        "log::the_last_entries_of_an_idle_group_are_copied_forward_and_nothing_behind_them_is_lost",
    );
}

#[test]
fn put_back_a_purge_before_the_base_is_found() {
    assert_found(
        Bug::PurgeBeforeBase,
        "snapshots::promise_5_a_node_whose_sled_is_damaged_makes_its_rows_again_from_base_and_log",
    );
}
