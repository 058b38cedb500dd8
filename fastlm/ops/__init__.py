"""The ops: one module each, with the public function and its readable reference."""
