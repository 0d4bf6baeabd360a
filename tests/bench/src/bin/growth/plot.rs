//! Panels with logarithmic axes, two a row, as SVG. Lines and text are of the colour scheme that the reader has chosen.

use std::fmt::Write as _;

use crate::measure::Curve;

/// One picture of several curves.
pub(crate) struct Panel<'a> {
    pub(crate) title: &'static str,
    pub(crate) unit: &'static str,
    /// What is counted from left to right.
    pub(crate) over: &'static str,
    pub(crate) curves: &'a [Curve],
}

const WIDTH: f64 = 430.0;
const HEIGHT: f64 = 330.0;
/// Of the axes, in a panel.
const LEFT: f64 = 62.0;
const RIGHT: f64 = WIDTH - 26.0;
const TOP: f64 = 96.0;
const BOTTOM: f64 = HEIGHT - 44.0;

/// Hues that can be told apart on white and on black, also by those who see few of them.
const STYLE: &str = "\
<style>
  text { font: 13px sans-serif; fill: #1f2328 }
  .title { font-weight: bold; font-size: 14px }
  .grid { stroke: #1f2328; stroke-opacity: .15 }
  .axis { stroke: #1f2328; fill: none }
  .curve { fill: none; stroke-width: 2.2 }
  .c0 { stroke: #0a6fd1; color: #0a6fd1 } .c1 { stroke: #c2570c; color: #c2570c } .c2 { stroke: #6e7781; color: #6e7781 }
  .baseline { stroke-dasharray: 6 4 }
  .dot { fill: currentColor; stroke: none }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 }
    .grid, .axis { stroke: #e6edf3 }
    .c0 { stroke: #58a6ff; color: #58a6ff } .c1 { stroke: #f0883e; color: #f0883e } .c2 { stroke: #9ea7b0; color: #9ea7b0 }
  }
</style>
";

/// Where values of an axis lie.
struct Scale {
    low: f64,
    high: f64,
    from: f64,
    to: f64,
}

impl Scale {
    fn of(&self, value: f64) -> f64 {
        let part = (value / self.low).ln() / (self.high / self.low).ln();
        self.from + part * (self.to - self.from)
    }

    /// Powers of ten, and where they are few what halves them.
    fn ticks(&self) -> Vec<f64> {
        let steps: &[f64] = if self.high / self.low > 200.0 {
            &[1.0]
        } else {
            &[1.0, 2.0, 5.0]
        };
        (0..9)
            .flat_map(|power| steps.iter().map(move |step| step * 10f64.powi(power)))
            .filter(|tick| (self.low * 0.999..=self.high * 1.001).contains(tick))
            .collect()
    }
}

fn short(value: f64) -> String {
    match value {
        1e6.. => format!("{}M", value / 1e6),
        1e3.. => format!("{}k", value / 1e3),
        _ => format!("{value}"),
    }
}

/// The whole picture.
pub(crate) fn svg(panels: &[Panel<'_>]) -> String {
    let rows = panels.len().div_ceil(2) as f64;
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {} {}\" role=\"img\">\n{STYLE}",
        WIDTH * 2.0,
        HEIGHT * rows
    );
    for (nth, panel) in panels.iter().enumerate() {
        let (x, y) = ((nth % 2) as f64 * WIDTH, (nth / 2) as f64 * HEIGHT);
        let _ = writeln!(text, "<g transform=\"translate({x} {y})\">");
        draw(&mut text, panel);
        text.push_str("</g>\n");
    }
    text.push_str("</svg>\n");
    text
}

fn draw(text: &mut String, panel: &Panel<'_>) {
    let points = || panel.curves.iter().flat_map(|curve| &curve.points);
    let most = |values: &mut dyn Iterator<Item = f64>| values.fold(f64::MIN_POSITIVE, f64::max);
    let least = |values: &mut dyn Iterator<Item = f64>| values.fold(f64::MAX, f64::min);
    let x = Scale {
        low: least(&mut points().map(|(at, _)| *at as f64)),
        high: most(&mut points().map(|(at, _)| *at as f64)),
        from: LEFT,
        to: RIGHT,
    };
    let lowest = least(&mut points().map(|(_, value)| *value));
    let highest = most(&mut points().map(|(_, value)| *value));
    let y = Scale {
        low: 10f64.powf(lowest.log10().floor()),
        high: 10f64.powf(highest.log10().ceil()),
        from: BOTTOM,
        to: TOP,
    };
    let _ = writeln!(
        text,
        "<text class=\"title\" x=\"{LEFT}\" y=\"22\">{}</text>",
        panel.title
    );
    for tick in y.ticks() {
        let at = y.of(tick);
        let _ = writeln!(
            text,
            "<path class=\"grid\" d=\"M{LEFT} {at:.1}H{RIGHT}\"/><text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            LEFT - 6.0,
            at + 4.0,
            short(tick)
        );
    }
    // The points themselves: what was not measured has no tick.
    let mut measured: Vec<usize> = points().map(|(at, _)| *at).collect();
    measured.sort_unstable();
    measured.dedup();
    for count in measured {
        let at = x.of(count as f64);
        let label = if count % 1_000 == 0 {
            short(count as f64)
        } else {
            count.to_string()
        };
        let _ = writeln!(
            text,
            "<path class=\"grid\" d=\"M{at:.1} {TOP}V{BOTTOM}\"/><text x=\"{at:.1}\" y=\"{}\" text-anchor=\"middle\">{label}</text>",
            BOTTOM + 17.0
        );
    }
    let middle = ((LEFT + RIGHT) / 2.0, (TOP + BOTTOM) / 2.0);
    let _ = writeln!(
        text,
        "<path class=\"axis\" d=\"M{LEFT} {TOP}V{BOTTOM}H{RIGHT}\"/>\
         <text x=\"{}\" y=\"{}\" text-anchor=\"middle\">{}</text>\
         <text transform=\"translate(16 {}) rotate(-90)\" text-anchor=\"middle\">time ({})</text>",
        middle.0,
        BOTTOM + 36.0,
        panel.over,
        middle.1,
        panel.unit
    );
    for (nth, curve) in panel.curves.iter().enumerate() {
        // The last of the colours, which is grey, is for what others do.
        let colour = if curve.baseline { 2 } else { nth.min(1) };
        let class = if curve.baseline { " baseline" } else { "" };
        let key = 40.0 + 17.0 * nth as f64;
        let _ = writeln!(
            text,
            "<path class=\"curve c{colour}{class}\" d=\"M{LEFT} {key}h30\"/><text x=\"{}\" y=\"{}\">{}</text>",
            LEFT + 38.0,
            key + 4.0,
            curve.name
        );
        let places: Vec<(f64, f64)> = curve
            .points
            .iter()
            .map(|(at, value)| (x.of(*at as f64), y.of(*value)))
            .collect();
        let line: Vec<String> = places
            .iter()
            .map(|(x, y)| format!("{x:.1} {y:.1}"))
            .collect();
        let _ = writeln!(
            text,
            "<path class=\"curve c{colour}{class}\" d=\"M{}\"/>",
            line.join("L")
        );
        for (x, y) in places {
            let _ = writeln!(
                text,
                "<circle class=\"dot c{colour}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\"/>"
            );
        }
    }
}
