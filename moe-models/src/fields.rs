//! [`Fields`]: an object of a JSON file, taken field by field, so that what is not implemented is refused by its name.

use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

/// A value, or the reason why a file is refused.
pub(crate) type Checked<T> = std::result::Result<T, String>;

/// The fields of an object that have not been looked at, and where it lies.
#[derive(Debug)]
pub(crate) struct Fields {
    at: String,
    left: Map<String, Value>,
}

impl Fields {
    /// The object `value`, which lies at `at`; the file's own is at "".
    pub(crate) fn of(value: &Value, at: impl Into<String>) -> Checked<Self> {
        let at = at.into();
        match value.as_object() {
            Some(left) => Ok(Self { at, left: left.clone() }),
            None if at.is_empty() => Err("the file must hold an object".into()),
            None => Err(format!("{at} must be an object, got {value}")),
        }
    }

    /// Where the object lies.
    pub(crate) fn at(&self) -> &str {
        &self.at
    }

    /// What has not been looked at.
    pub(crate) fn left(&self) -> &Map<String, Value> {
        &self.left
    }

    /// Where a field lies.
    fn path(&self, name: &str) -> String {
        if self.at.is_empty() { name.to_owned() } else { format!("{}.{name}", self.at) }
    }

    /// Null if it is not there.
    pub(crate) fn take(&mut self, name: &str) -> Value {
        self.left.shift_remove(name).unwrap_or_default()
    }

    /// `None` if it is null or not there.
    pub(crate) fn optional<T: DeserializeOwned>(&mut self, name: &str) -> Checked<Option<T>> {
        serde_json::from_value(self.take(name)).map_err(|e| format!("{}: {e}", self.path(name)))
    }

    /// `default` if it is null or not there.
    pub(crate) fn or<T: DeserializeOwned>(&mut self, name: &str, default: T) -> Checked<T> {
        Ok(self.optional(name)?.unwrap_or(default))
    }

    /// Refuses a field that is null or not there.
    pub(crate) fn required<T: DeserializeOwned>(&mut self, name: &str) -> Checked<T> {
        self.optional(name)?.ok_or_else(|| format!("{} is missing", self.path(name)))
    }

    /// A number from 1 to `most`.
    pub(crate) fn size(&mut self, name: &str, most: usize) -> Checked<usize> {
        let size = self.required(name)?;
        self.within(name, size, most)
    }

    /// The same, and `default` if it is null or not there.
    pub(crate) fn size_or(&mut self, name: &str, default: usize, most: usize) -> Checked<usize> {
        let size = self.or(name, default)?;
        self.within(name, size, most)
    }

    fn within(&self, name: &str, size: usize, most: usize) -> Checked<usize> {
        match (1..=most).contains(&size) {
            true => Ok(size),
            false => Err(format!("{} must be between 1 and {most}, got {size}", self.path(name))),
        }
    }

    /// A number above 0 that is not infinite.
    pub(crate) fn positive(&mut self, name: &str) -> Checked<f64> {
        let value = self.required(name)?;
        self.above_zero(name, value)
    }

    /// The same, and `default` if it is null or not there.
    pub(crate) fn positive_or(&mut self, name: &str, default: f64) -> Checked<f64> {
        let value = self.or(name, default)?;
        self.above_zero(name, value)
    }

    fn above_zero(&self, name: &str, value: f64) -> Checked<f64> {
        match value > 0.0 && value.is_finite() {
            true => Ok(value),
            false => Err(format!("{} must be a positive number, got {value}", self.path(name))),
        }
    }

    /// Fields that say how the file came about and nothing about what is in it.
    pub(crate) fn skip(&mut self, names: &[&str]) {
        names.iter().for_each(|name| drop(self.take(name)));
    }

    /// Refuses other values than these; null stands for a field that is not there.
    pub(crate) fn expect(&mut self, name: &str, wanted: &[Value]) -> Checked<()> {
        let got = self.take(name);
        if wanted.contains(&got) {
            return Ok(());
        }
        let wanted: Vec<String> = wanted.iter().map(Value::to_string).collect();
        Err(format!("{} must be {}, got {got}; nothing else is implemented", self.path(name), wanted.join(" or ")))
    }

    /// Refuses features that are not implemented: these fields must be absent, null, 0, false or empty.
    pub(crate) fn expect_none(&mut self, names: &[&str]) -> Checked<()> {
        let nothing = [Value::Null, json!({}), json!([]), json!(false), json!(0), json!(0.0)];
        names.iter().try_for_each(|name| self.expect(name, &nothing))
    }

    /// Refuses what has not been looked at.
    pub(crate) fn finish(self) -> Checked<()> {
        match self.left.keys().next() {
            Some(name) => Err(format!("{} is not implemented", self.path(name))),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn refused<T: std::fmt::Debug>(got: Checked<T>, part: &str) {
        let text = got.unwrap_err();
        assert!(text.contains(part), "{text:?} should name {part:?}");
    }

    #[test]
    fn fields_are_taken_by_their_types_and_refused_by_their_names() {
        let value = json!({"a": 3, "b": null, "c": "x", "d": 0, "e": -1.0, "f": {"g": 1}, "h": false});
        let mut fields = Fields::of(&value, "").unwrap();
        assert_eq!((fields.size("a", 4), fields.optional::<usize>("b")), (Ok(3), Ok(None)));
        assert_eq!((fields.or("missing", 7), fields.size_or("missing", 2, 3)), (Ok(7), Ok(2)));
        refused(fields.required::<usize>("missing"), "missing is missing");
        refused(fields.optional::<usize>("c"), "c: invalid type");
        refused(fields.size("d", 4), "d must be between 1 and 4, got 0");
        refused(fields.positive_or("e", 1.0), "e must be a positive number");
        refused(fields.positive("missing"), "missing is missing");
        fields.expect_none(&["h", "absent"]).unwrap();
        let mut inner = Fields::of(&fields.take("f"), "f").unwrap();
        refused(inner.expect("g", &[2.into(), Value::Null]), "f.g must be 2 or null, got 1");
        inner.finish().unwrap();
        fields.finish().unwrap();
    }

    #[test]
    fn what_nobody_asked_for_is_not_implemented() {
        refused(Fields::of(&json!({"new_idea": 1}), "").unwrap().finish(), "new_idea is not implemented");
        refused(Fields::of(&json!([1]), ""), "must hold an object");
        refused(Fields::of(&json!(1), "a.b"), "a.b must be an object");
    }
}
