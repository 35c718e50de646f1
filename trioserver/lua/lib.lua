-- The ledger: what all of its scripts have in common.
--
-- Redis is given this file, a newline, and the file of one script, as one text. A call is one
-- atomic step. KEYS has one key, from which all others are made: they have its partition in braces,
-- so they lie in the same slot of a cluster. ARGV is name, value, name, value...
--
-- Words
--   inbox    the stream of one user, of everyone, or of a topic. Its entries are notifications (`i`
--            id, `t` type, `p` payload, `x` when it expires, maybe `c` trace context and `f` from
--            whom) and updates (`u` state, `i` ids): of these notifications others have to hear that
--            they were read, or went away.
--   shared   an inbox that many read: that of everyone, and those of the topics, in partitions of
--            their own (t00 to t15). What is unread in it, and what a device has got, is not known.
--            Of a topic's notifications there are no events either, and that they expire is not
--            announced: both would be about as many as there are notifications.
--   place    the id of an entry: <ms>-<n>. n is seq * 4096 for a notification; an update carries
--            the seq of the newest notification and adds something. So n tells the seq, and ms
--            keeps the order even where a failover has rewound the seq.
--   point    <epoch>.<place>
--   box      an inbox and what the key `meta` says about it, as a table. What has changed is saved
--            at the end.
--   life     the hash of one notification: its state, and what became of it on each device.
--   hole     seqs that were withdrawn on purpose: nobody misses them.
--
-- An error in the middle of a script would leave half of its writes behind. So whatever can be
-- wrong with a request is found before the first write, and nothing that was stored is trusted to
-- parse.
--
-- Numbers are doubles: exact to 2^53, but `..` writes only 14 digits of them. That does for times
-- and seqs; places are written by placed().
--
-- The functions are in one table, because each call makes them anew: as locals that know each other
-- they would cost half as much again.

local call = redis.call
local ledger = {}

local SPAN = 4096
local DAY = 86400000
local KEPT = 45 * DAY -- meta, cursors and holes, after they were last needed
local TOLD = 300000 -- the life of a topic's notification after its end: enough for repetitions
local SEEN = 30 * DAY -- a device that was away for longer is forgotten
local LIFE_FIELDS = 192 -- devices may come under ever new names; a life stays bounded

local RANK = {
  accepted = 0, sent = 1, received = 2, acked = 3, read = 4, expired = 5, cancelled = 5,
}

local clock = call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local PREFIX, PARTITION = string.match(KEYS[1] or '', '^(ts:{(%w+)}:)')
ledger.of_topics = string.byte(PARTITION or '') == 116 -- t
ledger.shared = ledger.of_topics or PARTITION == 'all'

---- Requests

function ledger.refuse(problem)
  return redis.error_reply('BADREQUEST ' .. problem:sub(1, 200):gsub('%c', ' '))
end

-- ARGV as a table, or nil and what is wrong. `known` has the names that are understood.
function ledger.arguments(known)
  if not PREFIX then return nil, 'the key does not begin with ts:{<partition>}:' end
  local given = {}
  for i = 1, #ARGV, 2 do
    local name, value = ARGV[i], ARGV[i + 1]
    if not known[name] then return nil, 'unknown argument ' .. name end
    if not value then return nil, 'no value for ' .. name end
    given[name] = value
  end
  return given
end

-- A number that was stored or said by somebody, or nil.
function ledger.whole(value)
  if value and #value <= 16 and value:find('^%d+$') then return tonumber(value) end
end

-- The number `name` of a request. What is wrong with it is left in given.problem.
function ledger.number(given, name, default, low, high)
  local value = given[name]
  if not value then return default end
  local parsed = ledger.whole(value)
  if parsed and parsed >= low and parsed <= high then return parsed end
  given.problem = ('%s is no whole number from %.0f to %.0f'):format(name, low, high)
  return default
end

---- Text

-- As in the names of keys: whatever is special there is written in hexadecimal.
function ledger.encoded(name)
  return (name:gsub('[^%w_.@-]', function(c) return ('%%%02X'):format(c:byte()) end))
end

function ledger.decoded(name)
  if not name:find('%', 1, true) then return name end
  return (name:gsub('%%(%x%x)', function(hex) return string.char(tonumber(hex, 16)) end))
end

-- As JSON. The value is UTF-8.
function ledger.quoted(value)
  if value:find('[%c"\\]') then return cjson.encode(value) end
  return '"' .. value .. '"'
end

---- Places

-- Both numbers of a place, or nil.
function ledger.place(value)
  local ms, n = string.match(value or '', '^(%d+)%-(%d+)$')
  if ms and #ms <= 15 and #n <= 16 then return tonumber(ms), tonumber(n) end
end

function ledger.placed(ms, n)
  return ('%.0f-%.0f'):format(ms, n)
end

function ledger.seq_of(n)
  return math.floor(n / SPAN)
end

-- The epoch and the place of a point, or nil.
function ledger.split_point(value)
  local epoch, where = string.match(value or '', '^([a-z0-9]+)%.(%d+%-%d+)$')
  if epoch and ledger.place(where) then return epoch, where end
end

function ledger.is_after(ms, n, other_ms, other_n)
  return ms > other_ms or (ms == other_ms and n > other_n)
end

-- The later of two places. What is none counts as the beginning.
function ledger.later(one, other)
  local ms, n = ledger.place(one)
  local other_ms, other_n = ledger.place(other)
  if not ms then return other_ms and other or '0-0' end
  if other_ms and ledger.is_after(other_ms, other_n, ms, n) then return other end
  return one
end

---- Entries

-- The fields of an entry by name. A stranger's entry simply has none of those that we know.
function ledger.fields_of(entry)
  local fields, list = {}, entry[2] or {}
  for i = 1, #list, 2 do fields[list[i]] = list[i + 1] end
  return fields
end

-- Calls visit(ms, n, id) for the notifications behind `start` up to `stop` (a place or +),
-- until that returns true. In pieces, so that a long inbox is never copied as a whole.
function ledger.each_notification(inbox, start, stop, visit)
  local count = 8 -- usually it is one that is looked for
  while true do
    local entries = call('XRANGE', inbox, '(' .. start, stop, 'COUNT', count)
    for i = 1, #entries do
      local ms, n = ledger.place(entries[i][1])
      local fields = ledger.fields_of(entries[i])
      if ms and fields.i and fields.p and visit(ms, n, fields.i) then return end
    end
    if #entries < count then return end
    start, count = entries[count][1], 100
  end
end

---- Boxes

function ledger.box_of(owner)
  return {
    owner = owner,
    user = ledger.decoded(owner),
    meta = PREFIX .. 'meta:' .. owner,
    inbox = PREFIX .. 'inbox:' .. owner,
    changes = {},
  }
end

-- The box whose meta key KEYS[1] is; or nil.
function ledger.named_box()
  local owner = string.match(KEYS[1], '^ts:{%w+}:meta:([%w_.@%%-]+)$')
  return owner and ledger.box_of(owner)
end

-- Fills a box with what meta says; false if that is not there or makes no sense.
function ledger.load(box)
  local got = call('HMGET', box.meta, 'v', 'epoch', 'seq', 'last', 'unread', 'channel', 'ends',
    'pace')
  local ms, n = ledger.place(got[4])
  local epoch, seq, unread = got[2], ledger.whole(got[3]), ledger.whole(got[5])
  if got[1] ~= '1' or not ms or not unread or seq ~= ledger.seq_of(n) then return false end
  if not epoch or #epoch > 16 or not epoch:find('^[a-z0-9]+$') then return false end
  box.epoch, box.seq, box.last, box.ms, box.n, box.unread = epoch, seq, got[4], ms, n, unread
  box.channel = got[6] or nil
  box.ends = ledger.whole(got[7]) or 0
  box.pace = got[8] or nil
  return true
end

-- What meta says beyond that, as text or nil: `trimmed` and `expired` (the last that went so),
-- `update` (the newest), `received` (how far any device is), `read_to`, `since` (when the epoch
-- began), `base` (the seq before it).
function ledger.detail(box, field)
  if box[field] == nil and not box.is_new then
    box[field] = call('HGET', box.meta, field)
  end
  return box[field] or nil
end

function ledger.change(box, field, value)
  local changes = box.changes
  box[field] = value
  changes[#changes + 1] = field
  changes[#changes + 1] = value
end

function ledger.save(box)
  if box.is_new then call('DEL', box.meta) end
  call('HSET', box.meta, 'seq', box.seq, 'last', box.last, 'unread', box.unread,
    unpack(box.changes))
  call('PEXPIRE', box.meta, KEPT)
end

function ledger.point_of(box)
  return box.epoch .. '.' .. box.last
end

function ledger.usual_channel(box)
  if ledger.of_topics then return 'topic:' .. box.user end
  return ledger.shared and 'channels:broadcast' or 'user_noti:' .. box.user
end

---- Epochs

-- Lets a box go on behind what is in its inbox.
function ledger.survey(box)
  local ms, n
  local info = call('XINFO', 'STREAM', box.inbox)
  for i = 1, #info, 2 do
    if info[i] == 'last-generated-id' then ms, n = ledger.place(info[i + 1]) end
  end
  if not ms then -- a stranger's: nothing can be added behind it
    call('DEL', box.inbox, PREFIX .. 'holes:' .. box.owner)
    return
  end
  local since, base
  ledger.each_notification(box.inbox, '0-0', '+', function(its_ms, its_n, id)
    since, base = since or its_ms, base or ledger.seq_of(its_n) - 1
    local state = not ledger.shared and call('HGET', PREFIX .. 'n:' .. id, 'state')
    if state and (RANK[state] or 0) < RANK.read then box.unread = box.unread + 1 end
  end)
  box.ms, box.n, box.seq = ms, n, ledger.seq_of(n)
  box.since, box.base = since or now, base or box.seq
end

-- Begins an epoch. If the inbox has survived the meta key, its notifications stay in it and the
-- seq goes on behind them.
function ledger.renew(box, nonce)
  for _, field in ipairs { 'trimmed', 'expired', 'update', 'received', 'read_to' } do
    box[field] = nil
  end
  box.is_new, box.changes = true, {}
  box.seq, box.ms, box.n, box.unread, box.ends, box.since, box.base = 0, 0, 0, 0, 0, now, 0
  if call('EXISTS', box.inbox) == 1 then
    ledger.survey(box)
  else
    -- They are of seqs that will come again. Only if there are any: the first write of a publish
    -- has to be one that a full Redis refuses.
    local holes = PREFIX .. 'holes:' .. box.owner
    if call('EXISTS', holes) == 1 then call('DEL', holes) end
  end
  box.last = ledger.placed(box.ms, box.n)
  ledger.change(box, 'v', '1')
  ledger.change(box, 'epoch', nonce or redis.sha1hex(box.meta .. clock[1] .. clock[2]):sub(1, 8))
  ledger.change(box, 'since', tostring(box.since))
  box.base = box.base > 0 and tostring(box.base) or nil
  if box.base then ledger.change(box, 'base', box.base) end
  if box.channel then ledger.change(box, 'channel', box.channel) end
  if box.pace then ledger.change(box, 'pace', box.pace) end
end

-- Whether the key is the one that everybody uses for this owner: who gets it wrong would publish to
-- where nobody listens. Looked at once per epoch. CRC-32, four bits at a time.
function ledger.is_at_home(box)
  if PARTITION == 'all' then return box.owner == 'all' end
  if ledger.of_topics and (box.user == '' or box.user:find('[^%w.:/_@~-]')) then return false end
  if ledger.encoded(box.user) ~= box.owner or #box.user > 128 then return false end
  local steps = { [0] = 0, 0x1db71064, 0x3b6e20c8, 0x26d930ac, 0x76dc4190, 0x6b6b51f4, 0x4db26158,
    0x5005713c, 0xedb88320, 0xf00f9344, 0xd6d6a3e8, 0xcb61b38c, 0x9b64c2b0, 0x86d3d2d4,
    0xa00ae278, 0xbdbdf21c }
  local crc = 0xffffffff
  for i = 1, #box.user do
    crc = bit.bxor(crc, box.user:byte(i))
    crc = bit.bxor(bit.rshift(crc, 4), steps[bit.band(crc, 15)])
    crc = bit.bxor(bit.rshift(crc, 4), steps[bit.band(crc, 15)])
  end
  crc = bit.bxor(crc, 0xffffffff)
  if ledger.of_topics then return PARTITION == ('t%02d'):format(bit.band(crc, 15)) end
  return PARTITION == ('p%02d'):format(bit.band(crc, 63))
end

-- Loads a box, or begins its epoch. Returns what is wrong, if anything.
function ledger.open(box, nonce)
  if ledger.load(box) then return nil end
  if not ledger.is_at_home(box) then
    return 'the key has the wrong partition, or does not write the user or topic as it must'
  end
  ledger.renew(box, nonce)
end

---- Events

-- Writes an event, once per notification and kind. ledger.events_max is set by scripts that are
-- told; 0 is no limit. All events have the same fields: then the stream stores the names once.
function ledger.tell(kind, box, id, seq, device, why)
  if ledger.of_topics then return end
  local key = PREFIX .. 'n:' .. id
  if kind ~= 'accepted' and call('HSETNX', key, 'e:' .. kind, now) == 0 then return end
  if ledger.events_max > 0 then
    call('XADD', PREFIX .. 'events', 'MAXLEN', '~', ledger.events_max, '*', 'event', kind, 'id', id,
      'user', box.user, 'device', device, 'seq', seq, 'at', now, 'why', why)
  else
    call('XADD', PREFIX .. 'events', '*', 'event', kind, 'id', id, 'user', box.user,
      'device', device, 'seq', seq, 'at', now, 'why', why)
  end
end

---- Appending

function ledger.advance(box, is_notification)
  if is_notification then
    box.seq = box.seq + 1
    box.ms, box.n = math.max(now, box.ms), box.seq * SPAN
  elseif now > box.ms then
    box.ms, box.n = now, box.seq * SPAN + 1
  else
    box.n = box.n + 1
    if ledger.seq_of(box.n) > box.seq then box.ms, box.n = box.ms + 1, box.seq * SPAN + 1 end
  end
  box.last = ledger.placed(box.ms, box.n)
end

-- Adds an entry behind the last. Returns the point before it.
function ledger.append(box, is_notification, ...)
  local before = ledger.point_of(box)
  ledger.advance(box, is_notification)
  local added = redis.pcall('XADD', box.inbox, box.last, ...)
  if type(added) ~= 'table' then return before end
  if tostring(added.err):find('smaller', 1, true) then
    -- The inbox is ahead of what meta says, and nobody knows by what: a new epoch.
    ledger.renew(box)
    before = ledger.point_of(box)
    ledger.advance(box, is_notification)
  end
  -- Whatever else was wrong (a full Redis, say) fails here as well, and the caller hears why.
  call('XADD', box.inbox, box.last, ...)
  return before
end

-- The ids of the newest entry, if it is an update to this state and has room for so many more.
function ledger.mergeable(box, state, count)
  if ledger.detail(box, 'update') ~= box.last then return nil end
  local entry = call('XRANGE', box.inbox, box.last, box.last)[1]
  local fields = entry and ledger.fields_of(entry) or {}
  if fields.u ~= state or not fields.i then return nil end
  local _, spaces = fields.i:gsub(' ', ' ')
  return spaces + 1 + count <= 64 and fields.i or nil
end

function ledger.announce_some(box, state, ids, by)
  local list = table.concat(ids, ' ')
  local merged = ledger.mergeable(box, state, #ids)
  local stale = box.last
  local joined = merged and merged .. ' ' .. list or list
  local before = ledger.append(box, false, 'u', state, 'i', joined)
  if merged then call('XDEL', box.inbox, stale) end
  ledger.change(box, 'update', box.last)
  if call('PTTL', box.inbox) < 0 then
    -- It had gone, and this has made it anew.
    ledger.change(box, 'ends', now + DAY / 2)
    call('PEXPIREAT', box.inbox, now + DAY)
  end
  call('PUBLISH', box.channel or ledger.usual_channel(box), '\1u["' .. before .. '","'
    .. ledger.point_of(box) .. '",' .. box.unread .. ',"' .. state .. '",["'
    .. list:gsub(' ', '","') .. '"],' .. ledger.quoted(by) .. ']')
end

-- Lets everybody know of a new state: those who are away by entries, the others at once.
function ledger.announce(box, state, ids, by)
  for first = 1, #ids, 64 do
    local some = {}
    for i = first, math.min(first + 63, #ids) do some[#some + 1] = ids[i] end
    ledger.announce_some(box, state, some, by)
  end
end

---- Holes: `s<first>` = last and `e<last>` = first of each range

-- The first of each range, in order, and the last of each by its first.
function ledger.holes(box)
  local firsts, last_of, all = {}, {}, call('HGETALL', PREFIX .. 'holes:' .. box.owner)
  for i = 1, #all, 2 do
    local first = all[i]:sub(1, 1) == 's' and ledger.whole(all[i]:sub(2))
    local last = first and ledger.whole(all[i + 1])
    if last then
      firsts[#firsts + 1] = first
      last_of[first] = last
    end
  end
  table.sort(firsts)
  return firsts, last_of
end

function ledger.add_hole(box, seq)
  local key = PREFIX .. 'holes:' .. box.owner
  local below, above = 'e' .. (seq - 1), 's' .. (seq + 1)
  local got = call('HMGET', key, below, above)
  local first, last = ledger.whole(got[1]) or seq, ledger.whole(got[2]) or seq
  if got[1] or got[2] then call('HDEL', key, below, above) end
  call('HSET', key, 's' .. first, last, 'e' .. last, first)
  call('PEXPIRE', key, KEPT)
  -- 1024 ranges are enough for anybody. Beyond that the lowest are forgotten: who comes from so far
  -- back is told of a few more missing than there are.
  if call('HLEN', key) > 2048 then
    local firsts, last_of = ledger.holes(box)
    for i = 1, math.min(#firsts, 128) do
      call('HDEL', key, 's' .. firsts[i], 'e' .. last_of[firsts[i]])
    end
  end
end

---- Ends

-- One is not unread any more. What is from before the epoch has not been counted.
function ledger.discount(box, ms)
  if ledger.shared or ms < (ledger.whole(ledger.detail(box, 'since')) or 0) then return end
  box.unread = math.max(0, box.unread - 1)
end

-- Whether a device may show a notification of which nobody has reported so. A node of a cluster
-- does not know who listens at the others; there, what is young may be on its way.
function ledger.may_be_shown(ms, live)
  if live then return true end
  if now - ms >= 10000 then return false end
  local info = redis.pcall('INFO', 'cluster') -- which not everybody may ask
  return type(info) ~= 'string' or info:find('cluster_enabled:1', 1, true) ~= nil
end

-- Ends a notification, unless it is over or was read. Returns whether it did, and whether some
-- device may show it; nobody reports that of a topic's.
function ledger.finish(box, id, where, state, why)
  local ms, n = ledger.place(where)
  local key = PREFIX .. 'n:' .. id
  local was = call('HMGET', key, 'state', 'live')
  local rank = was[1] and (RANK[was[1]] or 0)
  call('ZREM', PREFIX .. 'due', 'x:' .. id, 'f:' .. id)
  if was[1] then call('PEXPIREAT', key, now + (ledger.of_topics and TOLD or DAY)) end
  if rank and rank >= RANK.read then return false, true end
  ledger.discount(box, ms)
  if not rank then return true, true end
  call('HSET', key, 'state', state)
  if why ~= '' then call('HSET', key, 'why', why) end
  ledger.tell(state, box, id, ledger.seq_of(n), '', why)
  return true, rank > 0 or ledger.of_topics or ledger.may_be_shown(ms, was[2])
end

-- Takes back a notification that nobody is to see any more.
function ledger.withdraw(box, id, where, why)
  local ended, shown = ledger.finish(box, id, where, 'cancelled', why)
  if not ended then return end
  local _, n = ledger.place(where)
  if call('XDEL', box.inbox, where) == 1 then ledger.add_hole(box, ledger.seq_of(n)) end
  if shown then ledger.announce(box, 'cancelled', { id }, '') end
end

---- Publishing

-- Withdraws what had this collapse key before, if no device has received it.
function ledger.collapse(box, item)
  local key = PREFIX .. 'collapse:' .. box.owner .. ':' .. ledger.encoded(item.collapse)
  local older = call('GET', key)
  local was = older and call('HMGET', PREFIX .. 'n:' .. older, 'state', 'place', 'user')
  local unseen = was and (RANK[was[1]] or RANK.read) < RANK.received
  if unseen and was[3] == box.user and ledger.place(was[2]) then
    ledger.withdraw(box, older, was[2], 'collapsed by ' .. item.id)
  end
  call('SET', key, item.id, 'PXAT', item.expires)
end

-- Lets the oldest entries go until one more makes `limit`. Returns how many there are now. A limit
-- that was lowered a lot is reached in several steps.
function ledger.make_room(box, limit)
  local length = call('XLEN', box.inbox)
  if length < limit then return length end
  local excess = math.min(length - limit + 1, 1000)
  for _, entry in ipairs(call('XRANGE', box.inbox, '-', '+', 'COUNT', excess)) do
    local fields = ledger.fields_of(entry)
    if ledger.place(entry[1]) and fields.i and fields.p then
      ledger.finish(box, fields.i, entry[1], 'expired', 'trimmed')
      box.trimmed = entry[1]
    end
  end
  call('XTRIM', box.inbox, 'MAXLEN', length - excess)
  if box.trimmed then ledger.change(box, 'trimmed', box.trimmed) end
  return length - excess
end

-- Puts a notification into an inbox. item: id, type, payload, expires, and maybe trace, collapse,
-- fallback (when), at (when it was accepted, if earlier), channel, sender.
function ledger.post(box, item, limit)
  local id, expires = item.id, item.expires
  if item.collapse then ledger.collapse(box, item) end
  local is_first = ledger.make_room(box, limit) == 0
  local before
  if item.sender then
    local more = item.trace and { 'f', item.sender, 'c', item.trace } or { 'f', item.sender }
    before = ledger.append(box, true, 'i', id, 't', item.type, 'p', item.payload, 'x', expires,
      unpack(more))
  elseif item.trace then
    before = ledger.append(box, true, 'i', id, 't', item.type, 'p', item.payload, 'x', expires,
      'c', item.trace)
  else
    before = ledger.append(box, true, 'i', id, 't', item.type, 'p', item.payload, 'x', expires)
  end
  if not ledger.shared then box.unread = box.unread + 1 end
  if expires > box.ends or is_first then
    -- The inbox lives a day longer than all that is in it; put off by half a day at a time.
    ledger.change(box, 'ends', math.max(box.ends, expires + DAY / 2))
    call('PEXPIREAT', box.inbox, box.ends + DAY / 2)
  end
  local channel = item.channel or box.channel or ledger.usual_channel(box)
  local heard = call('PUBLISH', channel, '\1n["' .. before .. '","' .. ledger.point_of(box) .. '",'
    .. box.unread .. ',"' .. id .. '",' .. ledger.quoted(item.type) .. ',' .. item.payload .. ','
    .. expires .. ',' .. (item.trace and ledger.quoted(item.trace) or 'null')
    .. (item.sender and ',' .. ledger.quoted(item.sender) .. ']' or ']'))
  local key = PREFIX .. 'n:' .. id
  call('HSET', key, 'state', 'accepted', 'user', box.user, 'seq', box.seq, 'place', box.last,
    'type', item.type, 'at', item.at or now, 'expires', expires)
  if heard > 0 then call('HSET', key, 'live', heard) end
  -- Until its end is noticed, which makes it a day. It must not go before: nobody would know then
  -- whose it was. In a topic that does no harm: what has expired is not read.
  call('PEXPIREAT', key, expires + (ledger.of_topics and DAY or KEPT))
  call('ZADD', PREFIX .. 'due', expires, 'x:' .. id)
  if item.fallback then
    call('HSET', key, 'fallback', item.fallback)
    call('ZADD', PREFIX .. 'due', item.fallback, 'f:' .. id)
  end
end

---- Cursors: how far each device is

function ledger.cursor_field(device)
  return 'd:' .. ((device or '') == '' and '-' or device)
end

-- After a new epoch: the devices are still known, but not where they are.
function ledger.unplace_devices(box, key)
  local all = call('HGETALL', key)
  for i = 1, #all, 2 do
    local rest = all[i + 1]:match('^%S+ %S+ %S+ (%S+ %d+)$')
    if all[i]:sub(1, 2) == 'd:' and rest then call('HSET', key, all[i], '- - - ' .. rest) end
  end
  call('HSET', key, 'epoch', box.epoch)
end

-- What is known of a device, or nil. `lost`: its places were of another epoch.
function ledger.recorded(box, device)
  local key, field = PREFIX .. 'cursors:' .. box.owner, ledger.cursor_field(device)
  local got = call('HMGET', key, 'epoch', field)
  if got[1] and got[1] ~= box.epoch then
    ledger.unplace_devices(box, key)
    got[2] = call('HGET', key, field)
  end
  if not got[2] then return nil end
  local sent, received, acked, all, seen = got[2]:match('^(%S+) (%S+) (%S+) (%S+) (%d+)$')
  if (ledger.whole(seen) or 0) < now - SEEN then return nil end
  return {
    lost = not (ledger.place(sent) and ledger.place(received) and ledger.place(acked)),
    sent = sent,
    received = received,
    acked = acked,
    all = all == '-' and '' or all,
  }
end

-- Forgets who was not seen for too long and, of more than 32, who was seen longest ago; but not the
-- one that is in `kept`.
function ledger.forget_devices(key, kept)
  local all = call('HGETALL', key)
  local count, oldest, oldest_seen = 0, nil, nil
  for i = 1, #all, 2 do
    if all[i]:sub(1, 2) == 'd:' then
      local seen = ledger.whole(all[i + 1]:match(' (%d+)$')) or 0
      if seen < now - SEEN then
        call('HDEL', key, all[i])
      else
        count = count + 1
        if all[i] ~= kept and (not oldest or seen < oldest_seen) then
          oldest, oldest_seen = all[i], seen
        end
      end
    end
  end
  if count > 32 then call('HDEL', key, oldest) end
end

function ledger.record(box, device, known)
  local key, field = PREFIX .. 'cursors:' .. box.owner, ledger.cursor_field(device)
  local all = known.all == '' and '-' or known.all
  local added = call('HSET', key, 'epoch', box.epoch, field, known.sent .. ' ' .. known.received
    .. ' ' .. known.acked .. ' ' .. all .. ' ' .. now)
  if added > 0 then ledger.forget_devices(key, field) end
  call('PEXPIRE', key, KEPT)
end
