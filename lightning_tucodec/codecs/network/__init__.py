"""Networks of CompressAI's form, whoever wrote them: built by class path, coded, imported."""
