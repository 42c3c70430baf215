// SPDX-License-Identifier: Apache-2.0
#include "pager/recorder.hpp"

#include <gtest/gtest.h>

#include <array>
#include <thread>

#include "base/error.hpp"

namespace tp {
namespace {

constexpr std::array kPages = {PageId{3}, PageId{4}, PageId{5}};

TEST(Recorder, StepsAndContentsInOrder) {
  Recorder recorder;
  recorder.begin(false);
  recorder.acquired(SetId{6});
  recorder.note(ContentChange::modified, kPages);
  recorder.released(SetId{6});
  recorder.note(ContentChange::ended, std::span(kPages).first(1));
  recorder.note(ContentChange::ended, {});
  EXPECT_EQ(recorder.end(), (std::vector<std::int32_t>{7, -7}));
  const std::vector<ContentNote> notes = recorder.contents();
  ASSERT_EQ(notes.size(), 2U);
  EXPECT_EQ(notes[0].position, 1);
  EXPECT_EQ(notes[0].change, ContentChange::modified);
  EXPECT_EQ(notes[0].pages.first, 3U);
  EXPECT_EQ(notes[0].pages.count, 3U);
  EXPECT_EQ(notes[1].position, 2);
  EXPECT_EQ(notes[1].change, ContentChange::ended);
  EXPECT_EQ(notes[1].pages.count, 1U);
}

TEST(Recorder, WhatEndsBetweenRecordingsIsTheNextOnes) {
  Recorder recorder;
  recorder.note(ContentChange::ended, kPages);
  recorder.note(ContentChange::modified, kPages);  // nobody asks by when
  recorder.begin(false);
  recorder.acquired(SetId{0});
  recorder.released(SetId{0});
  recorder.end();
  ASSERT_EQ(recorder.contents().size(), 1U);
  EXPECT_EQ(recorder.contents()[0].position, 0);
  EXPECT_EQ(recorder.contents()[0].change, ContentChange::ended);
  recorder.begin(false);
  recorder.end();
  EXPECT_TRUE(recorder.contents().empty());
}

TEST(Recorder, OtherThreadsEndContentsAndModifyUnnoticed) {
  Recorder recorder;
  recorder.begin(false);
  recorder.acquired(SetId{0});
  std::thread([&] {
    recorder.note(ContentChange::ended, kPages);
    recorder.note(ContentChange::modified, kPages);
  }).join();
  recorder.end();
  EXPECT_TRUE(recorder.contents().empty());
  recorder.begin(false);
  recorder.end();
  EXPECT_EQ(recorder.contents().size(), 1U);
}

TEST(Recorder, NotesBetweenRecordingsAreBounded) {
  Recorder recorder;
  for (std::size_t count = 0; count < kNotesBetweenMax + 5; ++count) recorder.note(ContentChange::ended, kPages);
  recorder.begin(false);
  recorder.end();
  EXPECT_EQ(recorder.contents().size(), kNotesBetweenMax);
}

TEST(Recorder, ADryRecordingNotesNothingAndKeepsWhatIsNoted) {
  Recorder recorder;
  recorder.note(ContentChange::ended, kPages);
  recorder.begin(true);
  recorder.note(ContentChange::modified, kPages);
  recorder.end();
  recorder.begin(false);
  recorder.end();
  EXPECT_EQ(recorder.contents().size(), 1U);
}

}  // namespace
}  // namespace tp
