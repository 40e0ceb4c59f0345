//! What the libraries tell of themselves through `tracing`: spans of passes, layers and phases, at debug level.

use crate::golden::{fixtures, logits};
use moe_models::{Decoder, Precision};
use std::sync::{Arc, Mutex};
use tracing::span::{Attributes, Id};
use tracing::{Level, Subscriber};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;

/// The names of the spans that open, each below those that it is in.
#[derive(Clone, Default)]
struct Opened(Arc<Mutex<Vec<String>>>);

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Opened {
    fn on_new_span(&self, _: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let Some(scope) = context.span_scope(id) else { return };
        let path: Vec<&str> = scope.from_root().map(|span| span.name()).collect();
        self.0.lock().unwrap().push(path.join(" > "));
    }
}

#[test]
fn a_pass_tells_of_its_layers_and_phases() {
    let opened = Opened::default();
    let subscriber = tracing_subscriber::registry()
        .with(tracing_subscriber::filter::LevelFilter::from_level(Level::DEBUG))
        .with(opened.clone());
    tracing::subscriber::with_default(subscriber, || {
        let decoder = Decoder::load(&fixtures().join("mixtral"), Precision::F32).unwrap();
        logits(&decoder, &[1, 2, 3]);
        let (spans, layers) = (opened.0.lock().unwrap(), decoder.config().layers.len());
        assert_eq!(spans[0], "load");
        for phase in ["attention", "feed_forward", "feed_forward > route", "feed_forward > dispatch"]
            .into_iter()
            .chain(["feed_forward > experts", "feed_forward > combine"])
        {
            let path = format!("pass > layer > {phase}");
            assert_eq!(spans.iter().filter(|span| **span == path).count(), layers, "{path}: {spans:?}");
        }
    });
}
