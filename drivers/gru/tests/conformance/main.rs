//! The driver before the conformance kit, over the model of its chiplets; and with bugs planted, which the kit has to find.

mod chiplets;
mod session;

use conformance::{Kit, Report, Rule};
use session::OnGru;
use shootdown_gru::{Config, LateDropIns, Plant};

#[global_allocator]
static WATCHED: conformance::Watched = conformance::Watched;

fn run(config: Config) -> Report {
    Kit::new().run(move |chiplets| OnGru::attach(chiplets, config.clone()))
}

#[test]
fn it_conforms() {
    let report = conformance::run(OnGru::probe);
    report.assert();
    println!("{report}");
}

#[test]
fn it_conforms_where_it_relies_on_the_hardware_to_ignore_late_drop_ins() {
    run(Config {
        late_drop_ins: LateDropIns::IgnoredByHardware,
        ..Config::default()
    })
    .assert();
}

#[test]
fn what_is_planted_is_found() {
    for (plants, rule) in [
        (Plant::NO_FLUSH_ON_UNMAP, Rule::Flush),
        (Plant::WRONG_RANGE, Rule::WholeEntry),
        (Plant::NOT_BEGUN, Rule::Begin),
        (Plant::CONTEXT_NOT_UNLOADED, Rule::Unload),
    ] {
        let report = run(Config {
            plants,
            ..Config::default()
        });
        assert!(report.rules().contains(&rule), "{plants:?}: {report}");
    }
}
