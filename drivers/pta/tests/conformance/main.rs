//! The driver before the conformance kit, over the model of its device; and over devices that do not do what they are told, as
//! a driver's bugs would have it, which the kit has to find.

mod device;
mod session;

use std::sync::Arc;
use std::time::Duration;

use conformance::{Kit, Rule};
use device::{Broken, Hardware};
use session::OnPta;
use shootdown_pta::Config;

#[global_allocator]
static WATCHED: conformance::Watched = conformance::Watched;

#[test]
fn it_conforms() {
    let report = conformance::run(OnPta::probe);
    report.assert();
    println!("{report}");
}

#[test]
fn it_conforms_a_page_at_a_time() {
    let config = Config {
        fault_around: 1,
        ..Config::default()
    };
    let probe = move |hardware: Arc<Hardware>| OnPta::attach(hardware, Broken::Nothing, config);
    Kit::new().run(probe).assert();
}

#[test]
fn what_does_not_reach_the_device_is_found() {
    for (broken, rule) in [
        (Broken::EntriesStay, Rule::Flush),
        (Broken::AnswersAtOnce, Rule::Flush),
        (Broken::QueuesGoOn, Rule::Unload),
    ] {
        // What is broken so may go on faulting for ever, and has been found by then.
        let kit = Kit::new().patience(Duration::from_secs(5));
        let report = kit
            .run(move |hardware: Arc<Hardware>| OnPta::attach(hardware, broken, Config::default()));
        assert!(report.rules().contains(&rule), "{broken:?}: {report}");
    }
}
