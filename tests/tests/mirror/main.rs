//! What a device that mirrors an address space owes its user, one property a test, over each kind of device.
//!
//! The memory is real: every page is a page of a memfd, mapped shared in this process, where the kernel lets the CPU reach it, and the
//! device reaches it as a frame by its number. So frames are judged, by the oracle, and what concerns the kernel (another process, a
//! file, a touch of the CPU) is the real kernel's doing.

mod device;
mod kernel;
mod properties;

use device::{OnGru, OnPta};

/// Each property, over each kind.
macro_rules! suite {
    ($($module:ident: $($property:ident)*;)*) => {
        mod gru {
            $($(#[test]
            fn $property() {
                crate::$module::$property::<crate::OnGru>();
            })*)*
        }
        mod pta {
            $($(#[test]
            fn $property() {
                crate::$module::$property::<crate::OnPta>();
            })*)*
        }
    };
}

suite! {
    properties:
        a_read_of_a_page_costs_one_fault_whatever_is_in_it
        writes_after_protect_fault_and_change_nothing
        without_access_a_read_faults_and_its_buffer_stays
        a_huge_page_is_one_entry_and_a_partial_unmap_splits_it
        map_read_unmap_rounds_are_never_stale
        an_unmap_during_an_operation_fails_it_where_it_was_or_not_at_all
        two_devices_see_the_same_data
        a_remap_moves_the_data_and_the_old_address_faults
        spaces_cloned_as_fork_does_keep_private_pages_apart;
    kernel:
        shared_memory_is_seen_by_another_process_and_the_device
        a_file_is_read_and_written
        exclusive_access_ends_with_a_touch_of_the_cpu
        exclusive_access_ends_with_any_change_of_the_pages;
}

#[test]
fn devices_of_both_kinds_see_the_same_data() {
    properties::two_see_the_same::<OnGru, OnPta>();
}
