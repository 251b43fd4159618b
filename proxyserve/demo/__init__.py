"""The demo family: a base that knows facts about invented people, and small experts that know how to answer."""
