"""Tests of the page cache and the precache."""
